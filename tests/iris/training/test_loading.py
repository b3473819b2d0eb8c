import json
import multiprocessing
import os
import select
import signal

import pytest
import torch
from small_shards import numbers, write_shard, write_shards

from iris.data import open_source
from iris.errors import SettingError
from iris.training.loading import Loader
from iris.training.safety import SIGNALS


def opened(path, **settings):
    return open_source("tar", path=path, **{"size": 8, "buffer": 4} | settings)


def taken(loader, count):
    return [[int(caption.split()[1]) for caption in next(loader).captions] for _ in range(count)]


def test_batches_go_through_the_epochs(tmp_path):
    source = opened(write_shards(tmp_path, 3, 5))
    batches = taken(Loader(source, 6, seed=1), 5)
    assert sum(batches, []) == numbers(source.stream(1, 0)) + numbers(source.stream(1, 1))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_ranks_and_workers_see_every_row_once_an_epoch(tmp_path, workers):
    source = opened(write_shards(tmp_path, 12, 2))
    seen = [taken(Loader(source, 2, 1, rank, 2, workers), 6) for rank in range(2)]
    assert sorted(n for rank in seen for batch in rank for n in batch) == list(range(24))


@pytest.mark.parametrize(("workers", "at"), [(0, 4), (2, 0), (2, 3), (2, 6)])
def test_a_loader_goes_on_at_the_batch_after_the_last_one_taken(tmp_path, workers, at):
    source = opened(write_shards(tmp_path, 7, 3))
    whole = taken(Loader(source, 4, 1, workers=workers), 12)
    loader = Loader(source, 4, 1, workers=workers)
    assert taken(loader, at) == whole[:at]
    position = json.loads(json.dumps(loader.position))  # while workers have prepared more
    again = Loader(source, 4, 1, workers=workers, position=position)
    assert taken(again, 12 - at) == whole[at:]
    third = Loader(source, 4, 1, workers=workers, position=again.position)
    assert taken(third, 1)[0] not in ([], whole[11])


def test_a_streamed_data_set_is_not_divided_among_the_workers_twice(tmp_path):
    write_shards(tmp_path, 4, 3)
    source = open_source("hub", path=tmp_path, streaming=True, image_column="jpg", text_column="txt", size=8)
    assert sorted(sum(taken(Loader(source, 3, 1, workers=2), 4), [])) == list(range(12))


def test_random_crops_and_tables(tmp_path):
    source = open_source("shapes", train=10, crop="random")
    loader = Loader(source, 4, seed=0, workers=2)
    captions = [caption for _ in range(4) for caption in next(loader).captions]
    assert len(set(captions)) > 5 and next(loader).images.shape == (4, 32, 32, 3)


def test_positions_of_other_arguments_are_refused(tmp_path):
    source = opened(write_shards(tmp_path, 2, 2))
    position = Loader(source, 2, 1).position
    with pytest.raises(SettingError, match=r"position to go on from.*'batch': 2.*'batch': 1"):
        Loader(source, 1, 1, position=position)
    with pytest.raises(SettingError, match=r"'shares': 1.*'shares': 2"):
        Loader(source, 2, 1, workers=2, position=position)
    with pytest.raises(SettingError, match="batch=0"):
        Loader(source, 0, 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_the_data_keep_their_kind(tmp_path, workers):
    write_shard(tmp_path / "bad" / "a.tar", range(6), **{f"r{i}": {"jpg": b"?"} for i in range(3)})
    with pytest.raises(SettingError, match=r"data\.max_bad"):
        taken(Loader(opened(tmp_path / "bad"), 2, 1, workers=workers), 3)
    write_shards(tmp_path / "low", 2, 2)
    with pytest.raises(SettingError, match="share 0 of 1 has no usable row in epoch 0"):
        taken(Loader(opened(tmp_path / "low", score_column="score", min_score=99), 2, 1, workers=workers), 1)


def test_passed_over_rows_are_counted(tmp_path):
    write_shard(tmp_path / "a.tar", range(8), r2={"txt": None})
    loader = Loader(opened(tmp_path, max_bad=0.1), 7, 1)
    taken(loader, 1)
    assert loader.bad == 1


def test_workers_leave_signals_to_the_process_that_trains(tmp_path):
    others = multiprocessing.active_children()
    loader = Loader(opened(write_shards(tmp_path, 4, 10)), 2, 1, workers=1)
    taken(loader, 1)
    (worker,) = [one for one in multiprocessing.active_children() if one not in others]
    for number in SIGNALS:
        os.kill(worker.pid, number)
    assert len(taken(loader, 10)) == 10 and worker.is_alive()


def test_a_loader_draws_nothing_from_the_global_generator(tmp_path):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    taken(Loader(opened(write_shards(tmp_path, 2, 4)), 2, 1, workers=1), 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_end_with_a_process_that_was_killed(tmp_path):
    """Which waits to hand over a batch that is larger than a pipe: until every writer of ours is gone."""
    source = opened(write_shards(tmp_path, 1, 10), size=128)
    ours, theirs = os.pipe()
    if (child := os.fork()) == 0:
        loader = Loader(source, 5, 1, workers=1)
        next(loader)
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(theirs)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert select.select([ours], [], [], 30)[0] and os.read(ours, 1) == b""
    os.close(ours)
