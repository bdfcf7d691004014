"""Costs: exact counts before anything runs (`cost`), and honest ratios of measured times (`timing`)."""
