"""The layout of a segment: what was put in comes out, and damage is noticed."""

from __future__ import annotations

import random
from dataclasses import dataclass

import mmh3
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vswapd_backends.base import I64, PAGE_BYTES, SEGMENT_BYTES
from vswapd_backends.segment import (
    CAPACITY,
    CHECK_BYTES,
    DIRECTORY_ENTRY_BYTES,
    ENTRY_OVERHEAD,
    HEADER_BYTES,
    LAYOUT_VERSION,
    MAGIC,
    NO_SLOT,
    Directory,
    ImageBuilder,
    LayoutError,
    digests,
    directory_words,
    fits,
    get_checks,
    parse_directory,
    parse_image,
    payload_of,
    put_checks,
    salted,
)

SLOTS = st.integers(0, NO_SLOT - 1)
LENGTHS = st.one_of(st.integers(1, PAGE_BYTES), st.sampled_from([1, 2, PAGE_BYTES - 1, PAGE_BYTES]))
ENTRIES = st.lists(st.tuples(SLOTS, LENGTHS), min_size=1, max_size=30)


def _body(slot: int, length: int) -> bytes:
    return random.Random(slot * 8192 + length).randbytes(length)


@dataclass
class Image:
    """A built image and what was put into it."""

    buffer: bytearray
    builder: ImageBuilder
    numbers: list[int]
    bodies: list[bytes]
    offsets: list[int]

    @property
    def view(self) -> memoryview:
        return memoryview(self.buffer)

    def body_at(self, offset: int, length: int) -> bytes:
        return bytes(self.buffer[offset + CHECK_BYTES : offset + CHECK_BYTES + length])


def _empty(*, salt: bool = True, sequence: int = 77) -> Image:
    buffer = bytearray(SEGMENT_BYTES)
    builder = ImageBuilder(
        memoryview(buffer), codec="zstd:3", sequence=sequence, group=5, salt=salt
    )
    builder.age = 42
    return Image(buffer, builder, [], [], [])


def _add(image: Image, portion: list[tuple[int, int]]) -> None:
    bodies = [_body(slot, length) for slot, length in portion]
    numbers = np.array([slot for slot, _ in portion], np.int64)
    lengths = np.array([length for _, length in portion], np.int64)
    image.offsets += image.builder.add(numbers, lengths, payload_of(bodies)).tolist()
    image.numbers += numbers.tolist()
    image.bodies += bodies


def _image(*portions: list[tuple[int, int]], salt: bool = True, round_up: bool = False) -> Image:
    image = _empty(salt=salt)
    for portion in portions:
        if round_up:
            image.builder.round_up()
        _add(image, portion)
    image.builder.finish()
    return image


@settings(deadline=None)
@given(portions=st.lists(ENTRIES, min_size=1, max_size=3), round_up=st.booleans())
def test_what_was_put_in_comes_out(
    portions: list[list[tuple[int, int]]], *, round_up: bool
) -> None:
    """Header, slots, places and bytes of any entries, in any portions, are parsed as they were."""
    image = _image(*portions, round_up=round_up)
    header, directory = parse_image(image.view)
    assert (header.codec, header.sequence, header.age, header.group) == ("zstd:3", 77, 42, 5)
    assert header.payload_end == image.builder.payload_end
    assert directory.numbers.tolist() == image.numbers
    assert directory.offsets.tolist() == image.offsets
    assert directory.lengths.tolist() == [len(body) for body in image.bodies]
    for offset, body in zip(image.offsets, image.bodies, strict=True):
        assert image.body_at(offset, len(body)) == body


@settings(deadline=None)
@given(portions=st.lists(ENTRIES, min_size=1, max_size=3), round_up=st.booleans())
def test_entries_do_not_overlap_and_end_below_the_directory(
    portions: list[list[tuple[int, int]]], *, round_up: bool
) -> None:
    """Payload grows up, directory down, and `room` says what is left between them."""
    image = _image(*portions, round_up=round_up)
    end = HEADER_BYTES
    for offset, body in zip(image.offsets, image.bodies, strict=True):
        assert offset >= end
        end = offset + CHECK_BYTES + len(body)
    builder = image.builder
    assert end == builder.payload_end
    assert builder.room == SEGMENT_BYTES - end - DIRECTORY_ENTRY_BYTES * builder.count


def test_the_bytes_are_those_of_the_documentation() -> None:
    """One entry, byte for byte: header, check, body, and its directory word at the very end."""
    image = _empty(salt=False)
    body = b"compressed"
    image.builder.add(np.array([0x1234567]), np.array([len(body)]), payload_of([body]))
    image.builder.finish()
    buffer = bytes(image.buffer)
    assert buffer[:4] == MAGIC
    assert int.from_bytes(buffer[4:6], "little") == LAYOUT_VERSION
    assert buffer[8:24] == b"zstd:3".ljust(16, b"\0")
    assert int.from_bytes(buffer[24:32], "little") == 77
    assert int.from_bytes(buffer[32:40], "little") == 42
    assert int.from_bytes(buffer[40:44], "little") == 1
    assert int.from_bytes(buffer[44:48], "little") == 64 + 8 + len(body)
    assert int.from_bytes(buffer[48:52], "little") == 5
    check = mmh3.hash64(body, x64arch=True, signed=False)[0]
    assert int.from_bytes(buffer[64:72], "little") == check
    assert buffer[72:82] == body
    assert int.from_bytes(buffer[-8:], "little") == len(body) << 40 | 0x1234567
    assert not any(buffer[82:-8])


def test_a_segment_of_the_smallest_entries_is_filled_to_the_end() -> None:
    """Entries of one byte fill a segment until not even one more fits, and all come out."""
    count = CAPACITY // (1 + ENTRY_OVERHEAD)
    lengths = np.ones(count + 1, np.int64)
    image = _empty()
    assert image.builder.room == CAPACITY
    assert fits(lengths, image.builder.room) == count
    _add(image, [(slot, 1) for slot in range(count)])
    image.builder.finish()
    assert fits(lengths, image.builder.room) == 0
    _, directory = parse_image(image.view)
    assert directory.numbers.tolist() == list(range(count))
    with pytest.raises(AssertionError):
        _add(image, [(count, 1)])


@settings(deadline=None)
@given(lengths=st.lists(LENGTHS, max_size=40), room=st.integers(0, CAPACITY))
def test_fits_agrees_with_a_plain_loop(lengths: list[int], room: int) -> None:
    """As many entries as fit in order, overhead included, and not one more."""
    count = 0
    for length in lengths:
        room -= length + ENTRY_OVERHEAD
        if room < 0:
            break
        count += 1
    whole = room + sum(length + ENTRY_OVERHEAD for length in lengths[: count + 1])
    assert fits(np.array(lengths, np.int64), whole) == count


@settings(deadline=None)
@given(entries=st.lists(st.tuples(st.one_of(SLOTS, st.just(NO_SLOT)), LENGTHS), max_size=60))
def test_directories_agree_with_a_plain_loop(entries: list[tuple[int, int]]) -> None:
    """Offsets are the running sum of footprints, and fillers take room but are no entries."""
    numbers = np.array([number for number, _ in entries], np.int64)
    lengths = np.array([length for _, length in entries], np.int64)
    found = parse_directory(directory_words(numbers, lengths))
    offset, expected = HEADER_BYTES, []
    for number, length in entries:
        if number != NO_SLOT:
            expected.append((number, offset, length))
        offset += CHECK_BYTES + length
    assert len(found) == len(expected)
    columns = (found.numbers.tolist(), found.offsets.tolist(), found.lengths.tolist())
    assert list(zip(*columns, strict=True)) == expected


def test_a_directory_can_be_cut_to_some_entries() -> None:
    """`pick` by mask or by index takes whole entries."""
    directory = Directory(np.array([1, 2, 3]), np.array([64, 80, 90]), np.array([8, 2, 5]))
    assert directory.pick(np.array([True, False, True])).offsets.tolist() == [64, 90]
    assert directory.pick(np.array([2, 0])).numbers.tolist() == [3, 1]


# Checks


def test_checks_are_the_first_half_of_mmh3() -> None:
    """The digest of an entry is what any mmh3 says of its compressed bytes."""
    bodies = [b"a", b"b" * 4096, random.Random(1).randbytes(1000)]
    expected = [mmh3.hash64(body, x64arch=True, signed=False)[0] for body in bodies]
    assert digests(bodies).tolist() == expected
    assert digests([memoryview(body) for body in bodies]).tolist() == expected
    assert payload_of(bodies) == b"".join(
        check.to_bytes(8, "little") + body for check, body in zip(expected, bodies, strict=True)
    )


@settings(deadline=None)
@given(slots=st.lists(SLOTS, min_size=1, max_size=20), sequence=st.integers(1, (1 << 63) - 1))
def test_salt_is_its_own_inverse(slots: list[int], sequence: int) -> None:
    """Salting twice gives the digest again."""
    plain = digests([_body(slot, 20) for slot in slots])
    numbers = np.array(slots, np.int64)
    once = salted(plain, numbers, sequence)
    assert salted(once, numbers, sequence).tolist() == plain.tolist()


def test_a_salted_check_fits_one_slot_of_one_image() -> None:
    """The same bytes have another check for each slot and each image."""
    plain = np.repeat(digests([b"same"]), 1000)
    numbers = np.arange(1000)
    checks = np.concatenate([salted(plain, numbers, sequence) for sequence in range(1, 51)])
    assert len(np.unique(checks)) == len(checks)


@pytest.mark.parametrize("salt", [True, False])
def test_images_for_devices_carry_salted_checks(*, salt: bool) -> None:
    """Checks in an image are salted with slot and sequence on devices, and plain in RAM."""
    image = _image([(7, 100), (NO_SLOT - 1, 4096), (9, 1)], salt=salt)
    checks = get_checks(np.frombuffer(image.buffer, np.uint8), np.array(image.offsets))
    plain = digests(image.bodies)
    numbers = np.array(image.numbers, np.int64)
    expected = salted(plain, numbers, 77) if salt else plain
    assert checks.tolist() == expected.tolist()


def test_checks_can_be_read_and_written_at_any_address() -> None:
    """What is put at odd addresses is got from there, and nothing around it changes."""
    arena = np.full(200, 0xAA, np.uint8)
    addresses = np.array([3, 64, 111], np.int64)
    checks = np.array([1, 2**64 - 1, 0x0102030405060708], np.uint64)
    put_checks(arena, addresses, checks)
    assert get_checks(arena, addresses).tolist() == checks.tolist()
    assert np.count_nonzero(arena != 0xAA) == 24
    assert get_checks(arena, np.empty(0, np.int64)).tolist() == []


# Building


@pytest.mark.parametrize("salt", [True, False])
def test_a_whole_segment_can_be_taken_over(*, salt: bool) -> None:
    """`copy` makes the image that adding every entry would have made."""
    entries = [(slot, 100 + slot) for slot in range(200)]
    source = _image(entries, salt=False)
    directory = Directory(
        np.array(source.numbers), np.array(source.offsets), np.array([e[1] for e in entries])
    )
    copied = _empty(salt=salt)
    offsets = copied.builder.copy(source.view, directory)
    copied.builder.finish()
    assert offsets.tolist() == source.offsets
    assert copied.buffer == _image(entries, salt=salt).buffer


def _round_up_at(payload_end: int) -> ImageBuilder:
    """A builder that was rounded up with its payload ending at `payload_end`."""
    image = _empty()
    while image.builder.payload_end < payload_end:
        left = payload_end - image.builder.payload_end - CHECK_BYTES
        length = left if left <= PAGE_BYTES else 2000
        _add(image, [(1, length)])
    assert image.builder.payload_end == payload_end
    image.builder.round_up()
    return image.builder


@pytest.mark.parametrize("gap", [0, 1, 7, 8, 9, 4000])
def test_rounding_up_begins_the_next_entry_on_a_block(gap: int) -> None:
    """Any gap to the next block is bridged by a filler, also one too small for its check."""
    builder = _round_up_at(5 * PAGE_BYTES - gap)
    assert builder.payload_end == (6 if 0 < gap < CHECK_BYTES else 5) * PAGE_BYTES
    builder.finish()
    _, directory = parse_image(builder.buffer)
    assert set(directory.numbers.tolist()) == {1}
    offsets = builder.add(np.array([2]), np.array([3]), payload_of([b"abc"]))
    assert offsets.tolist() == [builder.payload_end - CHECK_BYTES - 3]
    assert offsets[0] % PAGE_BYTES == 0
    builder.finish()
    assert parse_image(builder.buffer)[1].numbers.tolist()[-1] == 2


def test_rounding_up_without_room_does_nothing() -> None:
    """Where payload and directory are about to meet, no filler is written."""
    image = _empty()
    lengths = [PAGE_BYTES] * 63
    _add(image, list(enumerate(lengths)))
    before = (image.builder.payload_end, image.builder.count, image.builder.room)
    assert before[2] < PAGE_BYTES
    image.builder.round_up()
    assert (image.builder.payload_end, image.builder.count, image.builder.room) == before


def test_an_image_can_be_finished_again_and_again() -> None:
    """After each finish the image is whole, with all that was added up to then."""
    image = _empty()
    for slot in range(5):
        _add(image, [(slot, 300)])
        image.builder.finish()
        header, directory = parse_image(image.view)
        assert header.count == slot + 1
        assert directory.numbers.tolist() == list(range(slot + 1))


def test_an_image_of_nothing_is_one() -> None:
    """An image without entries can be parsed: it has none."""
    image = _empty()
    image.builder.finish()
    header, directory = parse_image(image.view)
    assert (header.count, len(directory), header.payload_end) == (0, 0, HEADER_BYTES)


# Damage


@pytest.mark.parametrize("fill", [b"\0", b"\xff", b"VSEG"])
def test_bytes_of_something_else_are_no_image(fill: bytes) -> None:
    """A discarded, erased or foreign extent is a LayoutError."""
    with pytest.raises(LayoutError):
        parse_image(memoryview((fill * SEGMENT_BYTES)[:SEGMENT_BYTES]))


@settings(deadline=None, max_examples=300)
@given(
    entries=ENTRIES,
    where=st.integers(0, HEADER_BYTES + 8 * 30 - 1),
    flip=st.integers(1, 255),
)
def test_damage_to_header_or_directory_is_noticed(
    entries: list[tuple[int, int]], where: int, flip: int
) -> None:
    """Any byte of the header or the directory that is not what it was is a LayoutError."""
    image = _image(entries)
    length = HEADER_BYTES + DIRECTORY_ENTRY_BYTES * len(entries)
    where %= length
    at = where if where < HEADER_BYTES else SEGMENT_BYTES - length + where
    image.buffer[at] ^= flip
    with pytest.raises(LayoutError):
        parse_image(image.view)


@settings(deadline=None, max_examples=300)
@given(header=st.binary(max_size=HEADER_BYTES - 8), entries=ENTRIES)
def test_any_header_is_parsed_or_refused(header: bytes, entries: list[tuple[int, int]]) -> None:
    """A header of any bytes behind a right magic is a LayoutError, and no other."""
    image = _image(entries)
    expected = bytes(image.buffer)
    image.buffer[8 : 8 + len(header)] = header
    if image.buffer == expected:
        assert parse_image(image.view)[1].numbers.tolist() == image.numbers
    else:
        with pytest.raises(LayoutError):
            parse_image(image.view)


@pytest.mark.parametrize(
    ("count", "payload_end"),
    [
        (0xFFFFFFFF, HEADER_BYTES),
        (SEGMENT_BYTES // 8 + 1, HEADER_BYTES),
        (1, SEGMENT_BYTES),
        (0, HEADER_BYTES - 1),
        (0, SEGMENT_BYTES + 1),
        (0xFFFFFFFF, 0xFFFFFFFF),
    ],
)
def test_counts_beyond_a_segment_are_refused(count: int, payload_end: int) -> None:
    """A header whose counts do not fit is refused before anything is read by them."""
    image = _image([(1, 100)])
    image.buffer[40:48] = count.to_bytes(4, "little") + payload_end.to_bytes(4, "little")
    with pytest.raises(LayoutError, match="counts"):
        parse_image(image.view)


def test_damage_to_an_entry_leaves_the_directory_readable() -> None:
    """Entries have their own checks: a flipped body is found by its check, and by no other."""
    image = _image([(slot, 500) for slot in range(20)])
    image.buffer[image.offsets[7] + CHECK_BYTES + 100] ^= 1
    _, directory = parse_image(image.view)
    assert _wrong(image, directory.offsets, directory) == [7]


def test_an_image_of_the_same_extent_before_is_found_out() -> None:
    """With a sequence that is not its own, no entry of an image agrees with its check."""
    entries = [(slot, PAGE_BYTES) for slot in range(20)]
    image = _image(entries)
    _, directory = parse_image(image.view)
    assert _wrong(image, directory.offsets, directory) == []
    assert _wrong(image, directory.offsets, directory, sequence=78) == list(range(20))


def _wrong(image: Image, offsets: I64, directory: Directory, sequence: int = 77) -> list[int]:
    checks = get_checks(np.frombuffer(image.buffer, np.uint8), offsets)
    bodies = [
        image.body_at(offset, length)
        for offset, length in zip(offsets.tolist(), directory.lengths.tolist(), strict=True)
    ]
    good = salted(checks, directory.numbers, sequence) == digests(bodies)
    return [int(i) for i in np.flatnonzero(~good)]
