"""Decide: everything a run needs is settled here and written into one frozen plan."""
