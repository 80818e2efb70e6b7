"""A client of several processes that hold a model together, one for each device.

=============  =================================================================================
``processes``  starts the others, and ends them
``team``       what the first one does with them: making the model, training a batch
``member``     what the others do
=============  =================================================================================
"""
