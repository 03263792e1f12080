"""Training batches: what the recipe says, whatever the threads, the source and where a run starts again."""

import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from image_files import CPU, make_set
from torch import Tensor

from fastdeitlt.config import AugmentConfig, Config, DataConfig
from fastdeitlt.core import batches
from fastdeitlt.core.batches import Batch, train_batches
from fastdeitlt.data.augment import colour
from fastdeitlt.data.pixels.prefetch import prefetch
from fastdeitlt.data.pixels.reader import Stream
from fastdeitlt.data.pixels.request import CropRequest
from fastdeitlt.data.pixels.workers import Workers
from fastdeitlt.data.sampler import MicroBatch, Plan
from fastdeitlt.data.sets.types import LongTailSet
from fastdeitlt.errors import UserError

SIZE = 24
RECIPES = ("deit", "pad_crop", "autoaugment_cutout", "crop_jitter", "none")


def made(images: LongTailSet, micro: list[MicroBatch], threads: int = 2, mixing: bool = True, **recipe) -> list[Batch]:
    cfg = Config(augment=AugmentConfig(**recipe))
    with closing(Stream(images, DataConfig(num_threads=threads), CPU)) as source:
        return list(train_batches(micro, source, images, cfg, mixing=mixing, size=SIZE))


def micro_batches() -> list[MicroBatch]:
    return [MicroBatch(e, i, 0, (np.arange(6) * 3 + i) % 11, np.arange(6) % 3) for e in range(2) for i in range(4)]


def same(left: list[Batch], right: list[Batch]) -> bool:
    pairs = list(zip(left, right, strict=True))
    return all(torch.equal(a.images_BCHW, b.images_BCHW) and torch.equal(a.labels_B, b.labels_B) for a, b in pairs)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_student_gets_the_whole_recipe(recipe: str, tmp_path) -> None:
    """Geometry and colour: what the teacher of the same recipe gets."""
    images, micro = make_set(tmp_path), micro_batches()
    ours = made(images, micro, recipe=recipe, mixing=False)
    view = colour.view_of(AugmentConfig(recipe=recipe))
    with closing(Stream(images, DataConfig(), CPU)) as source:
        for got, one in zip(ours, micro, strict=True):
            draws = colour.draw(one.sample_B, one.copy_B, seed=0, epoch=one.epoch, view=view, size=SIZE)
            ((_, crops_BHWC),) = source.crops([CropRequest(one.sample_B, SIZE, draws.draws)])
            assert torch.equal(got.images_BCHW, colour.apply(crops_BHWC, draws, view))
            assert got.images_BCHW.is_contiguous(memory_format=torch.channels_last)


def test_colour_recipes_change_colours(tmp_path) -> None:
    images, micro = make_set(tmp_path), micro_batches()

    def pixels(**recipe) -> Tensor:
        return torch.cat([b.images_BCHW for b in made(images, micro, mixing=False, **recipe)])

    plain = pixels(recipe="pad_crop")
    strong = pixels(recipe="autoaugment_cutout")
    black = -torch.tensor(AugmentConfig().mean) / torch.tensor(AugmentConfig().std)
    cut = (strong == black.view(1, 3, 1, 1)).all(1).float().mean((1, 2))
    assert (plain != strong).flatten(1).any(1).all()
    assert cut.mean() > 0.1, "Cutout takes up to a quarter of an image"
    deit_crop = pixels(recipe="deit", rand_ops=0, erase_prob=0)
    assert (pixels(recipe="crop_jitter") != deit_crop).flatten(1).any(1).float().mean() > 0.9


@pytest.mark.parametrize("recipe", ["deit", "autoaugment_cutout", "crop_jitter"])
def test_batches_do_not_depend_on_threads_or_on_where_a_run_starts_again(recipe: str, tmp_path) -> None:
    images = make_set(tmp_path)
    steps = [m for step in Plan(11, 2, 2, 3, 2).steps(1) for m in step.micro_batches]
    whole = made(images, steps, recipe=recipe)
    assert len(whole) == 4
    assert same(whole, made(images, steps, threads=1, recipe=recipe))
    assert same(whole[2:], made(images, steps[2:], recipe=recipe))


@pytest.mark.parametrize("recipe", ["pad_crop", "autoaugment_cutout", "crop_jitter"])
def test_the_kernel_is_refused_for_a_recipe_it_does_not_know(recipe: str) -> None:
    with pytest.raises(UserError, match=rf"got augment\.recipe={recipe}, expected .*\. Use augment\.impl=auto"):
        batches.use_kernel(AugmentConfig(recipe=recipe, impl="triton"), CPU)
    assert not batches.use_kernel(AugmentConfig(recipe=recipe), torch.device("cuda"))


def test_auto_takes_the_kernel_on_a_gpu_and_torch_on_a_cpu() -> None:
    assert batches.use_kernel(AugmentConfig(), torch.device("cuda"))
    assert not batches.use_kernel(AugmentConfig(), CPU)
    assert not batches.use_kernel(AugmentConfig(impl="torch"), torch.device("cuda"))


def test_data_threads_keep_to_a_core_and_the_step_keeps_its_own(tmp_path, monkeypatch) -> None:
    images, seen = make_set(tmp_path), set()
    apply = colour.apply

    def spy(crops_BHWC: Tensor, draws, view) -> Tensor:
        seen.add(torch.get_num_threads())
        return apply(crops_BHWC, draws, view)

    monkeypatch.setattr(colour, "apply", spy)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        made(images, micro_batches())
        assert seen == {1}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_an_odd_batch_cannot_be_mixed_but_can_be_used(tmp_path) -> None:
    images = make_set(tmp_path)
    odd = [replace(m, sample_B=m.sample_B[:3], copy_B=m.copy_B[:3]) for m in micro_batches()]
    assert len(made(images, odd, mixing=False)) == len(odd)
    with pytest.raises(UserError, match="got a batch of 3 images"):
        made(images, odd)


def test_a_generator_that_nobody_closed_may_be_collected_in_a_thread_that_the_producer_waits_for():
    collected = threading.Event()

    def items():
        yield 1
        collected.wait(20)
        yield 2

    numbers = prefetch(items(), 1)
    assert next(numbers) == 1
    collector = threading.Thread(target=lambda: (numbers.close(), collected.set()))
    collector.start()
    collector.join(10)
    assert collected.is_set()


def test_a_generator_that_nobody_closed_does_not_keep_the_process():
    """A run that ends by an exception leaves one; Python 3.13 waits for ever for a daemon thread once it ends."""
    code = "import itertools, sys; from fastdeitlt.data.pixels.prefetch import prefetch;"
    code += "sys.kept = prefetch(itertools.count(), 2); print(next(sys.kept))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "0\n")


def test_results_that_nobody_closed_may_be_collected_in_a_thread_that_the_next_ones_wait_for():
    collected, workers = threading.Event(), Workers(1)
    results = workers.map(lambda item: collected.wait(20 * item), range(4))
    assert next(results) is False
    collector = threading.Thread(target=lambda: (results.close(), collected.set()))
    collector.start()
    collector.join(10)
    assert collected.is_set()
    workers.close()


def test_workers_compute_whole_results_in_order_and_few_ahead():
    started, both, workers = [], threading.Barrier(2, timeout=20), Workers(2)

    def items():
        for item in range(10):
            started.append(item)
            yield item

    results = workers.map(lambda item: (item, both.wait() >= 0), items())  # two at once, or the barrier breaks
    assert next(results) == (0, True)
    assert len(started) == workers.count + 2
    assert [item for item, _ in results] == list(range(1, 10))
    workers.close()


def test_a_gpu_has_few_batches_in_preparation():
    for device, count in (("cpu", 32), ("cuda", 8)):
        workers = Workers(32, torch.device(device))
        assert workers.count == count
        workers.close()
