"""`dashboard()`: a page that shows live what the cluster is doing."""

from __future__ import annotations

from hpcdist._cluster.onlookers import Onlookers
from hpcdist._dashboard.server import Feed, Server
from hpcdist._public import public
from hpcdist._runtime.node import here


@public
class Dashboard:
    """A page that is being served; `dashboard()` makes it."""

    def __init__(self, server: Server) -> None:
        self._server = server
        port = server.server_address[1]
        self.port = port
        self._closed = False

    @property
    def url(self) -> str:
        """The address, with the token that lets one in."""
        return f"http://127.0.0.1:{self.port}/?token={self._server.access.token}"

    def close(self) -> None:
        """Serve the page no longer."""
        if not self._closed:
            self._closed = True
            self._server.close()

    def __enter__(self) -> Dashboard:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<hpcdist.Dashboard {'closed' if self._closed else self.url}>"

    def _repr_html_(self) -> str:
        if self._closed:
            return "<i>the dashboard is closed</i>"
        return f'<a href="{self.url}" target="_blank" rel="noopener">hpcdist dashboard</a>'


@public
def dashboard(port: int = 0, open_browser: bool = False) -> Dashboard:
    """Serve a page that shows live what the cluster is doing, on this host.

    Only who knows the address is let in: it has a token, which the browser exchanges for a cookie.
    While nobody looks, nothing is gathered.

    Args:
        port: Where; 0: any that is free.
        open_browser: Whether to open it here.

    Raises:
        OSError: The port is in use.

    Example:
        >>> import hpcdist
        >>> page = hpcdist.dashboard()
        >>> page.url  # doctest: +ELLIPSIS
        'http://127.0.0.1:.../?token=...'
        >>> page.close()
    """
    node = here.node
    node.admit()
    if node.me != 1:
        raise RuntimeError("Only process 1 sees what the cluster is doing")
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 65536:
        raise ValueError(f"port is a number from 0 to 65535, not {port!r}")
    node.start()
    onlookers = node.service(Onlookers)
    try:
        server = Server(port, Feed(onlookers.watch))
    except OSError as exc:
        message = f"port {port} cannot be used: {exc.strerror}; port=0 takes one that is free"
        raise OSError(exc.errno, message) from None
    made = Dashboard(server)
    if open_browser:
        import webbrowser

        webbrowser.open(made.url)
    return made
