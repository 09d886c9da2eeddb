"""A client in a process of its own, of whatever version: told by lines what to do, and answers so.

Run with the sources of the version that it is to be. It knows what it has stored, page by page.

This module must not import anything but that version's client, and what every Python has.
"""

from __future__ import annotations

import json
import random
import sys
import threading
from typing import Any

import vswap
from vswap.control import Control

PAGE = 4096
KINDS = ("zero", "noise", "text", "repeat")


def page(kind: str, seed: int) -> bytes:
    """A page that no other kind and seed gives; all zeros if that is the kind."""
    chooser = random.Random(f"{kind} {seed}")
    match kind:
        case "zero":
            return bytes(PAGE)
        case "noise":
            return chooser.randbytes(PAGE)
        case "text":
            words = [chooser.randbytes(3).hex() for _ in range(40)]
            return " ".join(chooser.choices(words, k=PAGE // 7 + 1)).encode()[:PAGE].ljust(PAGE)
        case "repeat":
            return seed.to_bytes(8, "little") * (PAGE // 8)
    raise ValueError(kind)


class Client:
    """One space, and what it should hold."""

    def __init__(self, path: str, name: str | None) -> None:
        self.path = path
        self.space = vswap.connect(path, name=name, timeout=60)
        self.held: dict[int, tuple[str, int]] = {}
        self.lost: set[int] = set()
        self.made = random.randrange(1 << 40)
        self.working: threading.Thread | None = None
        self.enough = threading.Event()
        self.rounds = 0
        self.failed = ""

    def store(self, count: int) -> None:
        """Pages of all kinds, to new slots."""
        what = [(KINDS[i % len(KINDS)], self.made + i) for i in range(count)]
        self.made += count
        slots = self.space.store(b"".join(page(*each) for each in what))
        self.held.update(zip(slots.tolist(), what, strict=True))

    def overwrite(self) -> None:
        """Every third one."""
        slots = list(self.held)[::3]
        what = [("noise", self.made + i) for i in range(len(slots))]
        self.made += len(slots)
        self.space.store(b"".join(page(*each) for each in what), slots=slots)
        self.held.update(zip(slots, what, strict=True))

    def free(self) -> None:
        """Every seventh one."""
        for slot in (slots := list(self.held)[::7]):
            del self.held[slot]
        self.space.free(slots)

    def look(self) -> set[int]:
        """The slots that are lost; all others have their pages."""
        lost = set()
        for slot, what in self.held.items():
            try:
                found = bytes(self.space.load([slot]))
            except vswap.PageLost:
                lost.add(slot)
            else:
                assert found == page(*what), f"slot {slot} has another page than {what}"
        return lost

    def check(self) -> int:
        """Every page is there, and what was lost still is; how many there are."""
        slots = [slot for slot in self.held if slot not in self.lost]
        for first in range(0, len(slots), 500):
            some = slots[first : first + 500]
            found = bytes(self.space.load(some))
            for i, slot in enumerate(some):
                assert found[i * PAGE : (i + 1) * PAGE] == page(*self.held[slot]), slot
        if self.lost:
            assert self.look() == self.lost
        assert set(self.space.slots().tolist()) == set(self.held)
        return len(self.held)

    def work(self) -> None:
        """Store, load and free without a pause, until told that it is enough."""

        def loop() -> None:
            try:
                while not self.enough.is_set():
                    self.rounds += 1
                    seeds = range(self.made + self.rounds * 50, self.made + self.rounds * 50 + 50)
                    content = b"".join(page("text", seed) for seed in seeds)
                    slots = self.space.store(content)
                    assert bytes(self.space.load(slots)) == content
                    self.space.free(slots)
            except BaseException as error:  # noqa: BLE001 - told to whoever asks
                self.failed = f"{type(error).__name__}: {error}"

        self.working = threading.Thread(target=loop)
        self.working.start()

    def rest(self) -> int:
        """Work no more; returns how many rounds there were."""
        assert self.working is not None
        self.enough.set()
        self.working.join()
        assert not self.failed, self.failed
        return self.rounds


def main() -> None:
    """Do what is told, line by line."""
    path, clients = sys.argv[1], dict[str, Client]()
    for line in sys.stdin:
        told: dict[str, Any] = json.loads(line)
        answer: Any = None
        try:
            match told:
                case {"do": "open", "who": who, **rest}:
                    client = clients[who] = Client(path, rest.get("name"))
                    client.held = {slot: (kind, seed) for slot, kind, seed in rest.get("held", [])}
                case {"do": "held", "who": who}:
                    answer = [[slot, *what] for slot, what in clients[who].held.items()]
                case {"do": "lose", "who": who}:
                    clients[who].lost = clients[who].look()
                    answer = len(clients[who].lost)
                case {"do": "close", "who": who}:
                    clients.pop(who).space.close()
                case {"do": "call", "verb": verb, "arguments": arguments}:
                    with Control(path) as control:
                        answer = control.call(verb, **arguments)
                case {"do": "status"}:
                    with Control(path) as control:
                        answer = control.status()
                case {"do": what, "who": who, **rest}:
                    answer = getattr(clients[who], what)(**rest)
            said = {"ok": answer}
        except Exception as error:  # noqa: BLE001 - whoever told it decides
            said = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(said), flush=True)
    for client in clients.values():
        client.space.close()


if __name__ == "__main__":
    main()
