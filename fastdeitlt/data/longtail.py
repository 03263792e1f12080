"""The public functions of long-tailed sets."""

from fastdeitlt.data.counts import cifar_lt_counts, drw_weights, shot_groups
from fastdeitlt.data.lists import read_list
from fastdeitlt.data.open_sets import open_sets
from fastdeitlt.data.sets import LongTailSet

__all__ = ["LongTailSet", "cifar_lt_counts", "drw_weights", "open_sets", "read_list", "shot_groups"]
