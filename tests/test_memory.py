import io

import pytest
import torch
from torch.nn.functional import normalize

from fastssl.memory import BLOCK, Memory, generator


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


# -- in bfloat16 ----------------------------------------------------------------------------------


def half_bank(images=10, dimension=4, momentum=0.5, seed=0) -> Memory:
    return Memory(images, dimension, momentum=momentum, seed=seed, dtype=torch.bfloat16)


def test_a_bank_in_bfloat16_takes_half_and_is_read_as_float32():
    whole, half = bank(100, 16), half_bank(100, 16)

    assert 2 * half.rows.nbytes == whole.rows.nbytes
    assert torch.equal(half.rows, whole.rows.bfloat16())
    read = half.read(torch.tensor([[4, 7]]))
    assert read.dtype == torch.float32
    assert torch.equal(read, half.rows[None, [4, 7]].float())
    assert torch.equal(half.draw(50), whole.draw(50))


@pytest.mark.parametrize(("momentum", "stalls_at"), [(0.5, 0.003), (0.9, 0.021), (0.99, 0.19)])
def test_in_bfloat16_a_row_follows_its_image_at_any_momentum(momentum, stalls_at):
    # Oracle: the bank in float32. Every row is drawn to an embedding of its own until it is there;
    # then the image changes for good by a thousandth of its length a step.
    count, dimension = 50, 128
    every = torch.arange(count)
    whole = bank(count, dimension, momentum)
    half = half_bank(count, dimension, momentum)
    nearest = half.rows.clone()  # the same, rounded to the nearest
    seen, away = embeddings(count, dimension), embeddings(count, dimension, seed=2)
    for _ in range(int(12 / (1 - momentum))):
        for memory in (whole, half):
            memory.see(every, seen)
            memory.finish_step()
        sums = momentum * nearest.float() + (1 - momentum) * seen
        nearest = normalize(sums, dim=1).bfloat16()
    stalled = (nearest.float() - whole.rows).norm(dim=1).mean().item()
    for _ in range(100):
        seen = normalize(seen + 0.001 * away, dim=1)
        for memory in (whole, half):
            memory.see(every, seen)
            memory.finish_step()
    error = half.rows.float() - whole.rows
    length = error.norm(dim=1).mean().item()

    # Up or down at random is off by the last bit, 2 ** -7.5 of a number, times sqrt(1 / 6) on the
    # average; a step leaves `momentum` of the former errors, whose squares add up.
    assert length < 1.2 * 2**-7.5 * (1 / 6 / (1 - momentum**2)) ** 0.5
    assert error.mean(0).norm() < 3 * length / count**0.5  # in no direction more than in others
    assert stalled == pytest.approx(stalls_at, rel=0.2)


def test_a_row_is_rounded_up_as_often_as_it_is_near():
    # 2 ** -10 above 1 is an eighth of bfloat16's last bit there
    memory = half_bank(4000, 8)
    exact = torch.full((4000, 8), 1 + 2**-10)
    rounded = memory._rounded(exact).float()
    up = (rounded > 1).float().mean().item()

    assert set(rounded.unique().tolist()) == {1.0, 1 + 2**-7}
    assert abs(up - 1 / 8) < 5 * (7 / 64 / 32_000) ** 0.5
    assert torch.equal(memory._rounded(-exact), -memory._rounded(exact))
    whole = torch.tensor([[1.0, 0.0, -0.5, 2**-20, -0.0, 1.5, 0.25, 1 + 2**-7]])
    assert torch.equal(memory._rounded(whole).float(), whole)  # what fits stays


def test_rounding_is_a_function_of_the_seed_and_the_step():
    def rows(seed, steps):
        memory = half_bank(50, 16)
        memory.seed, memory.steps = seed, steps
        torch.manual_seed(steps)
        memory.see(torch.arange(50), embeddings(50, 16))
        memory.finish_step()
        return memory.rows

    assert torch.equal(rows(0, 3), rows(0, 3))
    assert not torch.equal(rows(0, 3), rows(0, 4))
    assert not torch.equal(rows(0, 3), rows(1, 3))


def test_in_bfloat16_copies_count_once_and_a_sum_without_direction_leaves_the_row():
    memory, seen = half_bank(), embeddings(4)
    before = memory.rows.clone()
    memory.see(torch.tensor([3, 5, 3, 3]), seen)
    memory.see(torch.tensor([7]), -before[[7]].float())
    memory.finish_step()

    expected = before.float()
    expected[5] = normalize(expected[5] + seen[1], dim=0)
    expected[3] = normalize(expected[3] + seen[[0, 2, 3]].mean(0), dim=0)
    torch.testing.assert_close(memory.rows.float(), expected, rtol=2**-7, atol=0)
    assert torch.equal(memory.rows[[0, 1, 2, 4, 6, 7, 8, 9]], before[[0, 1, 2, 4, 6, 7, 8, 9]])


def test_restored_in_bfloat16_it_goes_on_the_same():
    memory = half_bank(30)
    memory.see(torch.tensor([1]), embeddings(1))
    memory.finish_step()
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    restored = half_bank(30, seed=0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    for each in (memory, restored):
        each.see(torch.tensor([9]), embeddings(1, seed=9))
        each.finish_step()

    assert torch.equal(memory.rows, restored.rows)


# -- first rows, read and told --------------------------------------------------------------------


def test_first_rows_of_a_large_bank_are_drawn_block_by_block_each_its_own():
    large = bank(BLOCK + 100, 2).rows

    assert torch.equal(large[:BLOCK], bank(BLOCK, 2).rows)
    assert not torch.equal(large[BLOCK:], large[:100])
    torch.testing.assert_close(large.norm(dim=1), torch.ones(BLOCK + 100))


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("count", [4, 32000])
def test_negatives_are_the_rows_of_what_is_drawn(batch, count):
    memory = bank()
    drawn, rows = memory.negatives(count, batch=batch)

    assert torch.equal(drawn, memory.draw(count, batch=batch))
    assert torch.equal(rows, memory.rows[drawn])


def test_a_bank_says_what_it_takes():
    assert bank(2_000_000, 4).summary() == (
        "memory bank: 2,000,000 rows of 4 in float32, 0.032 GB on each process"
    )
    assert "in bfloat16, 8e-08 GB" in half_bank().summary()
