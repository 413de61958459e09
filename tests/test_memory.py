import io

import pytest
import torch
from torch.nn.functional import normalize

from fastssl.memory import Memory, generator


def bank(images=10, dimension=4, momentum=0.5, seed=0) -> Memory:
    return Memory(images, dimension, momentum=momentum, seed=seed)


def embeddings(count, dimension=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(count, dimension, generator=generator), dim=1)


def test_bank_starts_as_unit_rows_in_all_directions_from_the_seed_alone():
    rows = bank(5000, 16).rows
    torch.manual_seed(3)  # the global generator plays no part

    assert torch.equal(rows, bank(5000, 16).rows)
    assert not torch.equal(rows, bank(5000, 16, seed=1).rows)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5000))
    assert rows.mean(0).abs().max() < 0.02


def test_row_becomes_the_unit_mean_of_old_and_new_and_others_stay():
    memory, seen = bank(momentum=0.25), embeddings(2)
    before = memory.rows.clone()
    memory.see(torch.tensor([7, 2]), seen)

    torch.testing.assert_close(memory.rows, before)  # nothing is written while the step is scored
    memory.finish_step()
    expected = before.clone()
    expected[[7, 2]] = normalize(0.25 * before[[7, 2]] + 0.75 * seen, dim=1)
    torch.testing.assert_close(memory.rows, expected)


def test_image_twice_in_a_step_counts_once_with_its_mean_embedding():
    memory, seen = bank(), embeddings(4)
    before = memory.rows.clone()
    memory.see(torch.tensor([3, 5, 3, 3]), seen)
    memory.finish_step()

    expected = before.clone()
    expected[5] = normalize(before[5] + seen[1], dim=0)
    expected[3] = normalize(before[3] + seen[[0, 2, 3]].mean(0), dim=0)
    torch.testing.assert_close(memory.rows, expected)


def test_two_batches_of_a_step_write_what_one_joined_batch_writes():
    joined, parts = bank(), bank()
    index, seen = torch.tensor([1, 4, 6, 4]), embeddings(4)
    joined.see(index, seen)
    joined.finish_step()
    parts.see(index[:2], seen[:2])
    parts.see(index[2:], seen[2:])
    parts.finish_step()

    assert torch.equal(joined.rows, parts.rows)
    assert joined.steps == parts.steps == 1


def test_sum_without_direction_leaves_the_row_as_it_was():
    memory = bank()
    before = memory.rows.clone()
    memory.see(torch.tensor([3]), -before[[3]])
    memory.finish_step()
    assert torch.equal(memory.rows, before)

    memory.see(torch.tensor([4]), torch.full((1, 4), float("nan")))
    memory.finish_step()
    memory.see(torch.tensor([4]), torch.full((1, 4), float("inf")))
    memory.finish_step()
    assert torch.equal(memory.rows, before)


def test_step_that_saw_nothing_writes_nothing():
    memory = bank()
    before = memory.rows.clone()
    memory.finish_step()

    assert torch.equal(memory.rows, before)
    assert memory.steps == 0


def test_step_is_written_in_full_precision_under_autocast():
    plain, half = bank(), bank()
    for memory in (plain, half):
        memory.see(torch.tensor([3, 3, 5]), embeddings(3))
    plain.finish_step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half.finish_step()

    assert torch.equal(plain.rows, half.rows)


def test_negatives_change_with_the_step_and_the_seed_and_only_with_them():
    memory = bank(1000)
    first = memory.draw(100)

    assert first.shape == (100,)
    assert first.dtype == torch.int64
    assert torch.equal(first, memory.draw(100))
    assert torch.equal(first, bank(1000).draw(100))
    assert not torch.equal(first, bank(1000, seed=1).draw(100))
    memory.see(torch.tensor([0]), embeddings(1))
    memory.finish_step()
    assert not torch.equal(first, memory.draw(100))


def test_negatives_per_image_differ_between_images_and_between_batches_of_a_step():
    memory = bank(1000)
    first = memory.draw(100, batch=2)
    memory.see(torch.tensor([0]), embeddings(1))
    second = memory.draw(100, batch=2)

    assert first.shape == (2, 100)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)


def test_negatives_are_uniform_over_the_bank():
    counts = torch.bincount(bank(20).draw(19, batch=10_000).flatten(), minlength=20)

    # 190 000 draws: 9500 a row, of standard deviation 95
    assert (counts - 9500).abs().max() < 5 * 95


@pytest.mark.parametrize("batch", [None, 3])
def test_bank_of_no_more_rows_than_negatives_is_given_whole_each_row_once(batch):
    assert bank(10).draw(10, batch=batch).tolist() == list(range(10))
    assert bank(10).draw(32000, batch=batch).tolist() == list(range(10))
    assert bank(10).draw(9, batch=batch).shape[-1] == 9


def test_restored_bank_continues_with_the_same_rows_and_negatives():
    memory = bank(100)
    for step in range(3):
        memory.see(torch.tensor([step]), embeddings(1, seed=step))
        memory.finish_step()
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    restored = bank(100, seed=0)
    restored.see(torch.tensor([1]), embeddings(1))  # of a step that was never finished
    restored.load_state_dict(torch.load(file, weights_only=True))

    for _ in range(2):
        assert torch.equal(memory.rows, restored.rows)
        assert torch.equal(memory.draw(50), restored.draw(50))
        assert torch.equal(memory.draw(50, batch=2), restored.draw(50, batch=2))
        for each in (memory, restored):
            each.see(torch.tensor([9]), embeddings(1, seed=9))
            each.finish_step()


def test_numbers_are_a_function_of_the_seed_and_the_stream_s_name_alone():
    def draw(seed, stream):
        return torch.rand(5, generator=generator("cpu", seed, stream)).tolist()

    drawn = [draw(0, "a"), draw(0, "b"), draw(1, "a")]
    torch.manual_seed(3)
    assert draw(0, "a") == drawn[0]
    assert len({tuple(each) for each in drawn}) == 3
