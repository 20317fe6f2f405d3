"""Measure what networks and sweeps cost. Nothing else imports this package."""
