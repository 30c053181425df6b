"""The tests are a package, so that workers can import test functions by name."""
