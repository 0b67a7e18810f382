"""Do: run a plan on this rank, never asking how it was found."""
