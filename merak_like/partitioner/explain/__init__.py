"""Why a plan is as it is, what else was possible, and what would change under other conditions. No torch."""
