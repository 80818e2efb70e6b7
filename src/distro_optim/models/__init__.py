"""Language models as Psyche's runs train them: the same names, order, shapes and arithmetic, from transformers.

====================  ==========================================================================================
``config``            ``config.json``, checked, in a form that Psyche's clients and transformers both read
``strangers``         what a peer's ``config.json`` may ask for: bounds on every number and list
``trial``             what bounds are not enough for: a model that is made in a process with limits first
``trial_process``     that process
``building``          a transformers model from it: on no device, empty, or fresh
``native_shapes``     names and shapes of the models that Psyche's peers run on their own code
``initialization``    the first weights of a new model
``batches``           samples as tensors, cut in micro-batches
``causal_lm``         :class:`CausalLM`: the model with its loss, for any training loop
``accumulation``      gradients of micro-batches, added in float32
``lightning_module``  :class:`PsycheCausalLM`: the same for Lightning
``optimization``      the optimizer and the schedule that a run prescribes
``weights``           tensors from a folder or from peers, verified, into a model
``saving``            folders in the layout of Hugging Face, written whole or not at all
``locations``         folders by the names under which a run knows them
``sharding``          :class:`CausalLM` in shards on several devices, by FSDP2 and tensor parallelism
``memory``            what training takes, and what there is
``sizes``             parameters, and bytes of a round, without the model
``dummy``             the model of Psyche's test runs, which learns nothing
====================  ==========================================================================================

Importing one of them imports torch at most; transformers and lightning come when a model is made.
"""
