"""What implementations of our interfaces have to pass, ours and yours. One module for each interface."""
