"""``transformers.Trainer`` in a run: :class:`SwarmTrainer`, or :class:`SwarmTraining` before a trainer derived from it.

::

    trainer = SwarmTrainer(model, args, train_dataset=data)  # hosts, and prints a ticket
    trainer = SwarmTrainer(model, args, train_dataset=data, run="psyche1...")  # joins, from anywhere


    class SwarmSFTTrainer(SwarmTraining, SFTTrainer):  # TRL's
        pass

One round of the run is one step of the trainer, so ``max_steps``, ``global_step``, schedules, and the names of
checkpoints mean what they mean elsewhere, and all peers agree on them.

=============  =============================================================================
``trainer``    the two classes, and what they change of a trainer
``rounds``     a round as the trainer's loop takes it, and an epoch of rounds
``following``  the callback by which counters, checkpoints and the end of training follow the run
``checks``     what of a trainer cannot work in a run
``hub``        who pushes to the hub, and what the model card says
=============  =============================================================================
"""

from .trainer import SwarmTrainer as SwarmTrainer
from .trainer import SwarmTraining as SwarmTraining

__all__ = ["SwarmTrainer", "SwarmTraining"]
