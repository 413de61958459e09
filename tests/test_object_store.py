"""Objects from a real server: whole or by ranges, ahead of need, through every kind of fault."""

import gc
import hashlib
import http.client
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from pipelines.readers import object_requests, object_store
from pipelines.readers.object_requests import Missing
from pipelines.readers.object_store import Access, Ahead, Part, Unreachable
from tests import object_server

URL = f"s3://{object_server.BUCKET}"
SIZE = 3_000_000
CALM = Access(retries=3, requests=4)
QUICK = Access(retries=3, timeout_s=0.5, requests=4)  # where nothing ever comes, on purpose
PATIENT = Access(retries=3, timeout_s=2, requests=4)  # where nothing comes at first, then all
CONTENT = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8).tobytes()
OBJECTS = 40
EVERY_TIME = 10**9
ODD_NAMES = ("a b+c%41.jpg", "\u00fc\u4e2d.jpg", "no:more,'$&=@;.jpg")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with object_server.store(tmp_path_factory.mktemp("moto")) as endpoint:
        with object_server.client(endpoint) as speaker:
            for name in ("large.bin", *ODD_NAMES):
                speaker.put_object(Bucket=object_server.BUCKET, Key=name, Body=CONTENT)
            speaker.put_object(Bucket=object_server.BUCKET, Key="empty", Body=b"")
            given = {"Bucket": object_server.BUCKET, "Key": "rows.bin"}
            speaker.put_object(**given, Body=CONTENT[:160_000])
            for row in range(OBJECTS):
                key = f"small/{row}"
                speaker.put_object(Bucket=object_server.BUCKET, Key=key, Body=small(row))
        yield endpoint


@pytest.fixture(scope="module")
def one_proxy(server: str) -> Iterator[object_server.Proxy]:
    with object_server.Proxy(server) as proxy:
        yield proxy


@pytest.fixture
def proxy(
    one_proxy: object_server.Proxy, monkeypatch: pytest.MonkeyPatch
) -> Iterator[object_server.Proxy]:
    """What the environment leads to, without faults at first; pauses are short."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in object_server.KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", one_proxy.endpoint)
    monkeypatch.setattr(object_requests, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(object_requests, "LONGEST_PAUSE", 0.02)
    one_proxy.requests.clear()
    one_proxy.signed.clear()
    one_proxy.fault = lambda number, path: None
    yield one_proxy
    one_proxy.fault = lambda number, path: None
    gc.collect()  # whoever failed asks no more


def small(row: int) -> bytes:
    return bytes([row]) * (row + 1)


def patience(fault: str, waiting: Access) -> Access:
    return waiting if fault in ("hang", "stall") else CALM


def only(fault: str, times: int) -> Callable[[int, str], str | None]:
    return lambda number, path: fault if number < times else None


def ranged(start: int, size: int, access: Access = CALM) -> bytes:
    url = f"{URL}/large.bin"
    stop = object_requests.Stop()
    return object_requests.fetch(
        url, start, size, object_requests.Tries(url, access, stop)
    ).tobytes()


def refusal(what: Callable[[], object]) -> str:
    """The one line that a user sees."""
    with pytest.raises(ValueError, match=r"\S") as caught:
        what()
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 500
    return line


def readers() -> int:
    return sum(thread.name.startswith("object-store") for thread in threading.enumerate())


def in_time(is_so: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 300
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.02)
    return is_so()


# One object


def test_urls_are_told_from_paths():
    assert object_store.is_url("s3://bucket/key")
    assert not object_store.is_url("/data/s3://bucket")
    assert not object_store.is_url("S3/bucket")
    assert object_store.join("s3://b/p/", "x") == object_store.join("s3://b/p", "x") == "s3://b/p/x"


def test_an_object_and_its_size_are_what_another_program_put_there(proxy):
    assert object_store.read(f"{URL}/large.bin") == CONTENT
    assert object_store.size(f"{URL}/large.bin") == SIZE
    assert object_store.read(f"{URL}/empty") == b""


def test_sizes_of_many_objects_say_which_are_missing(proxy):
    names = ["large.bin", "nothing", "empty", *(f"small/{row}" for row in range(OBJECTS))]
    proxy.fault = only("503", 3)
    found = object_store.sizes([f"{URL}/{name}" for name in names], CALM)

    assert found == [SIZE, None, 0, *range(1, OBJECTS + 1)]


def test_sizes_of_a_store_that_stays_away_end_in_a_line_and_nobody_goes_on_asking(proxy):
    before = readers()
    proxy.fault = only("503", EVERY_TIME)
    urls = [f"{URL}/small/{row}" for row in range(OBJECTS)]

    assert "the store answered 503 (tried 4 times in " in refusal(
        lambda: object_store.sizes(urls, CALM)
    )
    assert readers() == before
    assert len(proxy.requests) < 4 * OBJECTS


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_of_odd_characters_lead_to_their_objects(proxy, name):
    assert object_store.read(f"{URL}/{name}") == CONTENT


def test_a_range_is_asked_for_as_one_and_nothing_else_travels(proxy):
    assert ranged(1000, 70_000) == CONTENT[1000:71_000]
    assert [asked for _, _, asked in proxy.requests] == ["bytes=1000-70999"]


@pytest.mark.parametrize("url", ["s3://", "s3://bucket", "s3://bucket/", "s3:///key", "/a/file"])
def test_what_names_no_object_is_refused(proxy, url):
    assert f"{url}: name an object as s3://bucket/key" in refusal(lambda: object_store.read(url))
    assert proxy.requests == []


@pytest.mark.parametrize(
    "value", [{"retries": -1}, {"timeout_s": 0}, {"timeout_s": float("nan")}, {"requests": 0}]
)
def test_access_that_cannot_be_is_refused(value):
    with pytest.raises(ValueError, match=next(iter(value))):
        Access(**value)


# Faults

FAULTS = {
    "500": "the store answered 500 InternalError",
    "503": "the store answered 503 SlowDown",
    "close": "the connection was closed without an answer",
    "hang": "not a byte came for 0.5 s",
    "stall": "not a byte came for 0.5 s",
    "cut": "the connection was cut",
    "cut 0": "the connection was cut",
    "cut 100": "the connection was cut",
    "short": "the store answered with other bytes",
    "long": "the store answered with other bytes",
    "whole": "the store answered with other bytes",
    "garbage": "does not answer in HTTP",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_range_comes_whole_after_faults_that_pass(proxy, fault):
    proxy.fault = only(fault, 2)

    assert ranged(1000, 400_000, patience(fault, PATIENT)) == CONTENT[1000:401_000]
    assert len(proxy.requests) == 3


@pytest.mark.parametrize("fault", ["503", "close", "cut", "cut 100", "stall"])
def test_an_object_comes_whole_after_faults_that_pass(proxy, fault):
    proxy.fault = only(fault, 2)

    assert object_store.read(f"{URL}/large.bin", patience(fault, PATIENT)) == CONTENT


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_ends_in_a_line_that_says_what_and_how_often(proxy, fault):
    proxy.fault = only(fault, EVERY_TIME)
    found = refusal(lambda: ranged(1000, 400_000, patience(fault, QUICK)))

    assert found.startswith(f"{URL}/large.bin: ")
    assert FAULTS[fault] in found
    assert "(tried 4 times in " in found
    assert len(proxy.requests) == 4


def test_a_slow_store_is_only_slow(proxy):
    proxy.fault = only("slow", EVERY_TIME)

    assert ranged(0, 1000) == CONTENT[:1000]
    assert len(proxy.requests) == 1


def test_what_was_cut_off_goes_on_from_there(proxy):
    proxy.fault = only("cut 200000", 3)

    assert ranged(0, 400_000) == CONTENT[:400_000]
    starts = [int(asked.removeprefix("bytes=").split("-")[0]) for _, _, asked in proxy.requests]
    assert starts[:2] == [0, 0]  # the first try keeps no parts
    assert starts[2] > 100_000
    assert starts == sorted(starts)


def test_the_line_says_how_much_came_of_what_was_cut_off(proxy):
    proxy.fault = only("cut 200000", EVERY_TIME)
    found = refusal(lambda: ranged(0, 3_000_000, Access(retries=1)))

    assert " bytes (tried 2 times" in found
    assert " of 3,000,000 bytes" in found
    assert " after 200,000 of " in found or " after 1" in found


def test_a_long_object_over_a_bad_line_takes_as_many_tries_as_it_makes_progress(proxy):
    proxy.fault = only("cut 700000", EVERY_TIME)

    assert ranged(0, SIZE, Access(retries=3)) == CONTENT
    assert len(proxy.requests) == 6  # a first, and five of 700,000 bytes


@pytest.mark.parametrize("fault", ["", "cut", "cut 300000", "500"])
def test_places_apart_come_by_one_request_that_goes_on_where_it_broke_off(proxy, fault):
    edges = np.sort(np.random.default_rng(4).choice(900_000, 40, replace=False)) + 77
    starts, ends = edges[0::2].tolist(), edges[1::2].tolist()
    sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    proxy.fault = lambda number, path: fault if number < 2 else None
    tries = object_requests.Tries(f"{URL}/large.bin", CALM, object_requests.Stop())
    found = object_requests.fetch_apart(f"{URL}/large.bin", tuple(starts), tuple(sizes), tries)

    assert [each.tobytes() for each in found] == [
        CONTENT[start:end] for start, end in zip(starts, ends, strict=True)
    ]
    assert len(proxy.requests) == (3 if fault else 1)


def test_halves_of_two_objects_are_not_put_together(proxy, server):
    url = f"{URL}/changing"
    with object_server.client(server) as speaker:
        speaker.put_object(Bucket=object_server.BUCKET, Key="changing", Body=CONTENT)

        def change(number: int, path: str) -> str | None:
            if number == 3:  # after all of it, its size, and a half
                other = CONTENT[::-1]
                speaker.put_object(Bucket=object_server.BUCKET, Key="changing", Body=other)
            return "cut 1500000" if number < 3 else None

        proxy.fault = change
        found = refusal(lambda: object_store.read(url, CALM))

    assert found.startswith(f"{url}: the object was replaced while it was read after 1,")


@pytest.mark.parametrize(
    ("fault", "said"), [("403", "access was refused (403 AccessDenied)"), ("404", "no such object")]
)
def test_what_another_try_cannot_mend_is_told_at_once(proxy, fault, said):
    proxy.fault = only(fault, EVERY_TIME)

    assert said in refusal(lambda: ranged(0, 1000))
    assert len(proxy.requests) == 1


def test_a_missing_object_and_a_missing_bucket_are_told_apart(proxy):
    assert "no such object (404 NoSuchKey)" in refusal(lambda: object_store.read(f"{URL}/nothing"))
    assert "there is no such bucket (404 NoSuchBucket)" in refusal(
        lambda: object_store.read("s3://nobucket/nothing")
    )
    for url, kind in ((f"{URL}/nothing", Missing), ("s3://nobucket/nothing", Unreachable)):
        with pytest.raises(Unreachable) as caught:
            object_store.read(url)
        assert type(caught.value) is kind


def test_a_store_that_may_come_back_is_told_from_a_mistake(proxy, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    asks = (
        lambda: ranged(0, 1000),
        lambda: object_store.read(f"{URL}/large.bin", CALM),
        lambda: object_store.size(f"{URL}/large.bin", CALM),
        lambda: object_store.cached(f"{URL}/large.bin", tmp_path, SIZE, digest, CALM),
    )
    for fault, may_come_back in (("503", True), ("close", True), ("403", False), ("404", False)):
        proxy.fault = only(fault, EVERY_TIME)
        for ask in asks:
            with pytest.raises(Unreachable, match=f"^{URL}/large.bin: ") as caught:
                ask()

            assert isinstance(caught.value, ConnectionError) is may_come_back


@pytest.mark.parametrize("key", ["./a", "a//b", "a/../b", "a\tb", "a\udcff"])
def test_a_key_that_no_object_has_is_told_at_once(proxy, key):
    line = refusal(lambda: object_store.read(f"{URL}/{key}"))

    assert "this names no object: name an object as s3://bucket/key" in line
    assert "tried" not in line
    assert proxy.requests == []


def test_what_is_given_for_an_object_can_be_another_and_for_one_that_is_missing(proxy):
    def accept(row: int, content: np.ndarray | None) -> np.ndarray:
        return np.array([row] if content is None else content[:1] + 100, np.uint8)

    def parts(rows: list[int]) -> list[Part]:
        return [Part(f"{URL}/small/{row}", (row,)) for row in rows]

    rows = np.array([3, OBJECTS + 1])
    ahead = Ahead(lambda step: rows, parts, accept=accept, access=CALM)
    given = [each.tolist() for each in ahead.step(0)]
    ahead.close()

    assert given == [[103], [OBJECTS + 1]]


def test_a_range_behind_the_end_is_told_at_once(proxy):
    assert "the object ends before what was asked for" in refusal(lambda: ranged(SIZE + 5, 10))
    assert len(proxy.requests) == 1


def test_a_store_that_is_not_there_is_named(proxy, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")

    assert "no connection to http://127.0.0.1:9 (Connection refused) (tried 4 times" in refusal(
        lambda: ranged(0, 10)
    )


def test_an_endpoint_that_is_no_url_is_refused(proxy, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")

    assert refusal(lambda: ranged(0, 10)).startswith("AWS_ENDPOINT_URL (localhost:9000) must begin")


# Credentials


def test_a_refusal_names_the_variables_that_were_seen_and_never_their_values(proxy, monkeypatch):
    proxy.fault = only("403", EVERY_TIME)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "very-secret")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    found = refusal(lambda: ranged(0, 10))

    assert (
        "(seen: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION,"
        " AWS_ENDPOINT_URL)" in found
    )
    assert "secret" not in found.replace("AWS_SECRET_ACCESS_KEY", "")


def test_half_of_a_key_is_refused_before_anything_is_asked(proxy, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    found = refusal(lambda: ranged(0, 10))

    assert "Missing AccessKeyId" in found
    assert "(seen: AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)" in found
    assert proxy.requests == []


def test_a_profile_says_who_asks(proxy, monkeypatch, tmp_path):
    file = tmp_path / "credentials"
    file.write_text("[lab]\naws_access_key_id = theirs\naws_secret_access_key = hidden\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    for name in object_server.KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "lab")

    assert ranged(0, 10) == CONTENT[:10]
    assert "Credential=theirs/" in proxy.signed[-1]
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "the AWS profile nobody: " in refusal(lambda: ranged(0, 10))


def test_a_public_bucket_is_asked_without_a_signature(proxy, server, monkeypatch):
    given = {"Bucket": object_server.BUCKET, "Key": "large.bin", "ACL": "public-read"}
    with object_server.client(server) as speaker:
        speaker.put_object_acl(**given)
    for name in object_server.KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")

    assert ranged(0, 10) == CONTENT[:10]
    assert proxy.signed == [""]


def test_a_server_that_checks_keys_refuses_wrong_ones(tmp_path, monkeypatch):
    with object_server.store(tmp_path) as endpoint, object_server.client(endpoint) as speaker:
        speaker.put_object(Bucket=object_server.BUCKET, Key="x", Body=b"content")
        with object_server.client(endpoint, "iam") as iam:
            iam.create_user(UserName="reader")
            key = iam.create_access_key(UserName="reader")["AccessKey"]
            iam.put_user_policy(
                UserName="reader",
                PolicyName="read",
                PolicyDocument='{"Version": "2012-10-17", "Statement": [{"Effect": "Allow",'
                ' "Action": "s3:GetObject", "Resource": "*"}]}',
            )
        place = endpoint.removeprefix("http://")
        connection = http.client.HTTPConnection(place)
        connection.request("POST", "/moto-api/reset-auth", "0")
        connection.getresponse().read()
        connection.close()
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])

        assert object_store.read(f"{URL}/x") == b"content"
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        assert "refused (403 SignatureDoesNotMatch)" in refusal(
            lambda: object_store.read(f"{URL}/x")
        )
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "unknown")
        assert "refused (403 InvalidAccessKeyId)" in refusal(lambda: object_store.read(f"{URL}/x"))


# Kept on disk


def test_a_large_object_is_fetched_by_pieces_once_and_kept(proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(object_store, "PIECE", 1 << 20)
    digest = hashlib.sha256(CONTENT).hexdigest()
    found = object_store.cached(f"{URL}/large.bin", tmp_path / "kept", SIZE, digest)
    asked = len(proxy.requests)
    again = object_store.cached(f"{URL}/large.bin", tmp_path / "kept", SIZE, digest)

    assert found == again == tmp_path / "kept" / "large.bin"
    assert found.read_bytes() == CONTENT
    assert asked == len(proxy.requests) == 4  # how large, and three pieces


def test_a_kept_object_that_was_damaged_is_fetched_again(proxy, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    found = object_store.cached(f"{URL}/large.bin", tmp_path, SIZE, digest)
    found.write_bytes(CONTENT[:-1])
    object_store.cached(f"{URL}/large.bin", tmp_path, SIZE, digest)

    assert found.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("size", "digest", "said"),
    [
        (SIZE, "0" * 64, "its SHA-256 is not 000000000000"),
        (SIZE + 1, "0" * 64, "it has 3,000,000 bytes, not 3,000,001"),
        (SIZE, "../../etc", "is no SHA-256"),
    ],
)
def test_another_object_than_the_manifest_says_is_refused_and_not_kept(
    proxy, tmp_path, size, digest, said
):
    assert said in refusal(lambda: object_store.cached(f"{URL}/large.bin", tmp_path, size, digest))
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_two_processes_that_start_together_fetch_one_copy(proxy, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    given = (f"{URL}/large.bin", tmp_path, SIZE, digest)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = [pool.apply_async(object_store.cached, given) for _ in range(2)]
        paths = {each.get(300) for each in found}
        pool.close()
        pool.join()

    assert paths == {tmp_path / "large.bin"}
    assert (tmp_path / "large.bin").read_bytes() == CONTENT
    assert len([1 for method, _, _ in proxy.requests if method == "GET"]) == 1


def test_a_full_disk_is_told_in_a_line(proxy, small_disk):
    digest = hashlib.sha256(CONTENT).hexdigest()

    assert "No space left" in refusal(
        lambda: object_store.cached(f"{URL}/large.bin", small_disk, SIZE, digest)
    )
    assert [path.name for path in small_disk.iterdir() if path.suffix != ".lock"] == []


# Ahead of need


def plan(steps: int, batch: int = 8) -> Callable[[int], np.ndarray]:
    """Rows of small objects, each epoch in another order; ends after `steps`."""

    def rows(step: int) -> np.ndarray:
        if step >= steps:
            raise StopIteration
        epoch, place = divmod(step, OBJECTS // batch)
        return np.random.default_rng(epoch).permutation(OBJECTS)[place * batch :][:batch]

    return rows


def whole(rows: list[int]) -> list[Part]:
    return [Part(f"{URL}/small/{row}", (row,)) for row in rows]


def pieces(rows: list[int]) -> list[Part]:
    """Rows are 100 bytes of one object each."""
    starts = tuple(row * 100 for row in rows)
    return [Part(f"{URL}/rows.bin", tuple(rows), starts, (100,) * len(rows))]


def test_objects_come_in_the_order_of_the_plan_and_then_it_ends(proxy):
    rows = plan(15)
    ahead = Ahead(rows, whole, access=CALM)
    found = [[each.tobytes() for each in ahead.step(step)] for step in range(15)]

    assert found == [[small(row) for row in rows(step)] for step in range(15)]
    with pytest.raises(StopIteration):
        ahead.step(15)
    ahead.close()


def test_objects_come_in_order_through_every_passing_fault(proxy):
    names = [fault for fault in FAULTS if fault not in ("hang", "stall")]
    chosen = np.random.default_rng(1)
    proxy.fault = lambda number, path: str(chosen.choice(names)) if chosen.random() < 0.3 else None
    rows = plan(10)
    ahead = Ahead(rows, whole, access=Access(retries=30, requests=8))
    found = [[each.tobytes() for each in ahead.step(step)] for step in range(10)]
    ahead.close()

    assert found == [[small(row) for row in rows(step)] for step in range(10)]
    assert len(proxy.requests) > OBJECTS


def test_later_steps_are_under_way_before_they_are_asked_for(proxy):
    ahead = Ahead(plan(5), whole, access=CALM)
    ahead.step(0)

    assert in_time(lambda: len(proxy.requests) == OBJECTS)
    proxy.fault = only("500", EVERY_TIME)  # whatever came before is here
    assert [len(ahead.step(step)) for step in range(1, 5)] == [8] * 4
    ahead.close()


def test_requests_are_made_at_the_same_time_up_to_their_number(proxy):
    lock, now, most = threading.Lock(), [0], [0]

    def busy(number: int, path: str) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1

    proxy.busy = busy
    ahead = Ahead(plan(5), whole, access=Access(requests=4))
    for step in range(5):
        ahead.step(step)
    ahead.close()
    proxy.busy = lambda number, path: None

    assert most[0] == 4


def test_no_more_bytes_are_asked_for_than_allowed(proxy):
    rows = [np.arange(step * 5, step * 5 + 5) for step in range(100)]
    ahead = Ahead(rows.__getitem__, pieces, limit=4000, access=CALM)
    for step in range(20):
        ahead.step(step)

        assert ahead.held == 4000
    assert in_time(lambda: len(proxy.requests) == 5 * 20 + 40)
    ahead.close()
    assert len(proxy.requests) == 5 * 20 + 40


def test_a_group_comes_by_one_request_and_each_row_is_let_go_alone(proxy):
    generator = np.random.default_rng(3)
    # Windows of 4 groups of 10 rows, shuffled within: as by `fastssl.order.by_chunks`.
    order = [generator.permutation(np.arange(at, at + 40)) for at in range(0, 1600, 40)]
    rows = np.concatenate(order).reshape(-1, 8)
    ahead = Ahead(
        rows.__getitem__,
        pieces,
        group=lambda wanted: wanted // 10,
        limit=6000,
        look=40,
        access=CALM,
    )
    most = 0
    for step in range(len(rows)):
        for row, content in zip(rows[step].tolist(), ahead.step(step), strict=True):
            assert content.tobytes() == CONTENT[row * 100 : row * 100 + 100]
        most = max(most, ahead.held)
    ahead.close()

    assert len(proxy.requests) == 160
    assert most < 6000 + 1000


def test_a_row_that_is_asked_for_twice_in_a_step_and_again_later_is_given_each_time(proxy):
    rows = [[1, 1, 2], [2, 1, 3], [3, 3, 3], [1, 2, 3]]
    ahead = Ahead(lambda step: np.array(rows[step]), whole, access=CALM)
    found = [[each.tobytes() for each in ahead.step(step)] for step in range(4)]
    ahead.close()

    assert found == [[small(row) for row in step] for step in rows]


def test_a_plan_of_the_same_rows_for_ever_takes_no_time_for_ever(proxy):
    ahead = Ahead(lambda step: np.array([5, 6]), whole, access=CALM)

    assert [each.tobytes() for each in ahead.step(0)] == [small(5), small(6)]
    assert [each.tobytes() for each in ahead.step(1)] == [small(5), small(6)]
    assert len(proxy.requests) == 2
    ahead.close()


def test_a_plan_of_no_rows_for_ever_takes_no_time_for_ever(proxy):
    ahead = Ahead(lambda step: np.zeros(0, np.int64), whole, access=CALM)

    assert ahead.step(0) == []
    assert ahead.step(1) == []
    ahead.close()


def test_another_step_than_the_next_begins_there(proxy):
    rows = plan(20)
    ahead = Ahead(rows, whole, access=CALM)
    ahead.step(0)
    found = [each.tobytes() for each in ahead.step(7)]
    ahead.close()

    assert found == [small(row) for row in rows(7)]


def test_a_wrong_content_is_asked_for_again(proxy):
    def check(row: int, content: np.ndarray) -> str | None:
        is_so = content.tobytes() == CONTENT[row * 100 : row * 100 + 100]
        return None if is_so else f"row {row} is wrong"

    proxy.fault = only("flip", 1)
    ahead = Ahead(
        lambda step: np.arange(10),
        pieces,
        group=lambda wanted: wanted // 10,
        check=check,
        access=CALM,
    )
    found = np.concatenate(ahead.step(0)).tobytes()
    ahead.close()

    assert found == CONTENT[:1000]
    first_asked, again = [asked for _, _, asked in proxy.requests]
    assert first_asked == "bytes=0-999"
    first, last = map(int, again.removeprefix("bytes=").split("-"))
    assert last - first == 99  # that row alone


def test_a_content_that_stays_wrong_is_told(proxy):
    proxy.fault = only("flip", EVERY_TIME)
    ahead = Ahead(
        lambda step: np.arange(3),
        pieces,
        check=lambda row, content: f"s3://pictures/rows.bin: row {row} is wrong",
        access=CALM,
    )

    assert "is wrong, 3 times" in refusal(lambda: ahead.step(0))


def test_an_error_comes_with_the_step_that_needs_it_and_not_before(proxy):
    rows = plan(5)
    bad = int(rows(2)[3])
    proxy.fault = lambda number, path: "404" if path.endswith(f"/{bad}") else None
    ahead = Ahead(rows, whole, access=CALM)

    assert len(ahead.step(0)) == len(ahead.step(1)) == 8
    with pytest.raises(Unreachable, match=f"small/{bad}: there is no such object"):
        ahead.step(2)
    proxy.fault = lambda number, path: None
    assert [each.tobytes() for each in ahead.step(2)] == [small(row) for row in rows(2)]
    ahead.close()


def tens(rows: np.ndarray) -> np.ndarray:
    return rows // 10


@pytest.mark.parametrize(("parts", "group", "requests"), [(whole, None, 40), (pieces, tens, 4)])
def test_what_failed_ahead_of_need_is_asked_for_again_when_its_step_comes(
    proxy, parts, group, requests
):
    bad = requests // 2
    proxy.fault = lambda number, path: "503" if number == bad else None
    rows = np.arange(OBJECTS).reshape(5, 8)
    alone = Access(retries=0, requests=1)
    ahead = Ahead(rows.__getitem__, parts, group=group, look=OBJECTS, access=alone)
    found = ahead.step(0)

    assert in_time(lambda: len(proxy.requests) == requests)  # the last: the bad one has failed
    found += [each for step in range(1, 5) for each in ahead.step(step)]
    ahead.close()
    expected = [small(row) if group is None else CONTENT[row * 100 :][:100] for row in range(40)]
    assert [each.tobytes() for each in found] == expected
    assert len(proxy.requests) == requests + 1


@pytest.mark.parametrize(("fault", "more"), [("503", 1), ("404", 0)])
def test_what_failed_ahead_of_need_and_fails_again_is_told(proxy, fault, more):
    proxy.fault = lambda number, path: fault if path.endswith("/20") else None
    rows = np.arange(OBJECTS).reshape(5, 8)
    ahead = Ahead(rows.__getitem__, whole, access=Access(retries=0, requests=1))
    ahead.step(0)

    assert in_time(lambda: len(proxy.requests) == OBJECTS)
    ahead.step(1)
    with pytest.raises(Unreachable, match=f"small/20: .*{fault}"):
        ahead.step(2)
    assert len(proxy.requests) == OBJECTS + more


def test_what_fails_while_a_step_waits_for_it_is_not_waited_for_twice(proxy):
    proxy.fault = only("503", EVERY_TIME)
    ahead = Ahead(lambda step: np.array([5]), whole, access=Access(retries=2))
    with pytest.raises(Unreachable, match="tried 3 times"):
        ahead.step(0)

    assert len(proxy.requests) == 3


def test_an_error_of_the_plan_comes_with_its_step(proxy):
    def rows(step: int) -> np.ndarray:
        if step == 2:
            raise ValueError("not one can be decoded")
        return np.array([step])

    ahead = Ahead(rows, whole, access=CALM)

    assert len(ahead.step(0)) == len(ahead.step(1)) == 1
    with pytest.raises(ValueError, match="not one can be decoded"):
        ahead.step(2)
    ahead.close()


def test_closing_ends_the_threads_and_lets_the_bytes_go(proxy):
    before = readers()
    ahead = Ahead(plan(5), whole, access=CALM)
    ahead.step(0)

    assert readers() == before + CALM.requests
    ahead.close()
    assert readers() == before
    assert ahead.held == 0


def test_forgetting_ends_the_threads(proxy):
    before = readers()
    ahead = Ahead(plan(5), whole, access=CALM)
    ahead.step(0)
    del ahead
    gc.collect()

    assert in_time(lambda: readers() == before)


def test_after_an_error_nobody_goes_on_asking(proxy):
    before = readers()
    proxy.fault = only("503", EVERY_TIME)
    ahead = Ahead(plan(5), whole, access=Access(retries=2, requests=2))
    with pytest.raises(Unreachable):
        ahead.step(0)

    assert in_time(lambda: readers() == before)
    assert len(proxy.requests) < 3 * OBJECTS
