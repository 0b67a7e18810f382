"""The schedule that is built for its costs, rather than for equal stages; see build.py."""
