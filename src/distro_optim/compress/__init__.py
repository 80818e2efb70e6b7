"""Mathematics only: tiles, transforms, selection, signs, and what one peer says in one round. No network."""
