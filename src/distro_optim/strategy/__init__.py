"""Plugs a run into a training loop. Import from the modules; nothing is loaded here."""
