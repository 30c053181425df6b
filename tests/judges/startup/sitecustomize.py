"""Make our backend known to the programs that joblib's tests start; it brings its own workers."""

import os

if os.environ.pop("JUDGED_BACKEND", ""):
    import joblib

    import hpcdist
    from hpcdist._integrations.joblib import _backend_class

    class _WithWorkers(_backend_class()):  # type: ignore[misc]
        def configure(self, *args, **kw):  # type: ignore[no-untyped-def]
            if hpcdist.workers() == [1]:
                hpcdist.addprocs(2)
            return super().configure(*args, **kw)

    joblib.register_parallel_backend("hpcdist", _WithWorkers)
