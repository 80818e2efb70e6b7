"""A server of connections, whatever they are for: the coordinator's and the one of training data stand on it.

==================  =================================================================================
``service``         the seam between a server's rules and its sockets
``connection``      one connection as the server sees it: handshake, limits, what is still to be sent
``limits``          how much one stranger may ask for
``watched_clock``   notices that the process has slept
``stream_server``   the sockets: bytes moved, one timer, nothing decided
==================  =================================================================================
"""
