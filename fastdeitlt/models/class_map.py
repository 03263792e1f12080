"""Class maps: entry i is the model's class of label i of the data set."""
# K classes

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastdeitlt.errors import UserError


def frequency_class_map(counts: Sequence[int]) -> list[int]:
    """The class of each label when classes are ordered from most to least frequent; ties keep the labels' order.

    The official ImageNet-LT and iNaturalist-2018 code sorts with numpy's default, unstable argsort, so its order among
    classes of equal count depends on the numpy version and the processor: a released student is only right with the map
    of its own checkpoint (``load_student_checkpoint`` returns it), not with one computed anew.

    Source: ``class_map`` of the official data sets.
    """
    order_K = np.argsort(-np.asarray(counts), kind="stable")
    map_K = np.empty_like(order_K)
    map_K[order_K] = np.arange(len(order_K))
    return map_K.tolist()


def check_class_map(class_map: Sequence[int] | Tensor, num_classes: int) -> Tensor:
    """A class map as int64 [K], after checking that it is a permutation.

    Raises:
        UserError: wrong length, or a class that is missing or twice.
    """
    map_K = torch.as_tensor(class_map, dtype=torch.long).flatten()
    if not torch.equal(map_K.sort().values, torch.arange(num_classes, device=map_K.device)):
        raise UserError(
            f"class map: got {len(map_K)} entries, {len(map_K.unique())} of them distinct, expected every class of "
            f"0..{num_classes - 1} once"
        )
    return map_K


def teacher_to_student(
    teacher_map: Sequence[int] | None, student_map: Sequence[int] | None, num_classes: int
) -> Tensor | None:
    """The student's class of each class of the teacher, through the labels that both class maps start from.

    None stands for the identity, in the arguments and in the result.

    Raises:
        UserError: see ``check_class_map``.
    """
    identity_K = torch.arange(num_classes)
    teacher_K = identity_K if teacher_map is None else check_class_map(teacher_map, num_classes)
    student_K = identity_K if student_map is None else check_class_map(student_map, num_classes)
    mapped_K = student_K[teacher_K.argsort()]
    return None if torch.equal(mapped_K, identity_K) else mapped_K
