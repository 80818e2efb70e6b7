"""A whole run on one machine: the same script in several processes, watched, and disturbed on purpose."""
