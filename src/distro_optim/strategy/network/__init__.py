"""The thread of the network: what ``rounds`` decides is carried out here.

===================  ===================================================="""
