"""Count and measure what networks and sweeps cost. No other package imports this one."""
