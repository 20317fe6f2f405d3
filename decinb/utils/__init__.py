"""Small helpers that know nothing of pipelines or sweeps, one purpose per file."""
