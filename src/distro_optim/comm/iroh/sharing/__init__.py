"""Joiners get the model from peers, as Psyche's clients do: ``model-sharing/0``.

===================  =============================================================================
``exchange``         what a client calls
``transfer``         both sides of the protocol
``search``           who has the model? All peers are asked at once
``peers``            whom to ask next for a part
``live``             single tensors of the model in training, for peers of our own kind
``asking``           how often each peer may ask
``requests``         one question and its answer, for both protocols
``messages``         the bytes of questions and answers
``torchscript``      one tensor as the archive that C++ ``torch::save`` writes
``_tensor_pickle``   the one pickle program that such an archive may hold, read without running it
``_stored_zip``      the plainest zip file
===================  =============================================================================
"""
