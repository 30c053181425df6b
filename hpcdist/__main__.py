"""`python -m hpcdist`."""

from hpcdist._cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
