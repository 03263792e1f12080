"""Public functions for long-tailed data sets."""

from fastdeitlt.data.sets.counts import cifar_lt_counts, drw_weights, shot_groups
from fastdeitlt.data.sets.lists import read_list
from fastdeitlt.data.sets.opening import open_sets
from fastdeitlt.data.sets.types import LongTailSet

__all__ = ["LongTailSet", "cifar_lt_counts", "drw_weights", "open_sets", "read_list", "shot_groups"]
