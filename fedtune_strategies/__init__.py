"""The algorithms of FedTune: what an integrator imports.

This package knows torch and numbers; it knows no process, socket or command line. Rooms:

``seed_space``
    Directions from seeds, exact on every device; rebuild, projection, fingerprint.
``zeroth_order``
    Scalar gradients without backpropagation.
``blocks``
    The blocks of a model, their schedule, their codecs, the local training of one.
``language``
    Hugging Face models, instruction data, evaluation: shared by server and nodes.
``protocol``
    The typed messages of every method and their translation to and from Flower records.
``strategies``
    One Flower ``Strategy`` per method.
"""
