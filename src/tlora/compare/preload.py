"""What the runs of a comparison import before they do anything else, for the fork server.

Importing starts no thread, so the process that has imported this may fork.
"""

import datasets  # noqa: F401
import peft  # noqa: F401
import scipy.stats  # noqa: F401
import sklearn.metrics  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401
import trl  # noqa: F401

import tlora.adapter.attach  # noqa: F401
import tlora.compare.onerun  # noqa: F401
import tlora.training.train  # noqa: F401
