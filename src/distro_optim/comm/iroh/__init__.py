"""Peers find each other and exchange bytes over iroh: identity, connections, gossip, blobs."""
