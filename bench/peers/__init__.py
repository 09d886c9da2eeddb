"""vswapd beside what people would use instead, on the same pages, in one run.

    python -m bench.peers [--short] [--clients 1,2,4] [--only NAME] [--json FILE] [--svg FILE]

Every peer stands at its best configuration behind one small interface (`contract`). All of them are
started, and warmed up, before anything is measured; then they are measured in turns, so that what
else the machine does hits all alike.

Invariants:
- The same captured pages, batches of BATCH pages, and number of clients for all. Clients are
  processes with page buffers of their own; each pass begins for all of them at one gate.
- A store overwrites: what stood under the same key, sector or slot goes, in all peers. It counts
  when it was acknowledged.
- Every peer's pages are loaded and compared, byte for byte, before it is measured.
- A peer that is not there is named with the reason.
- Nothing is left: no process, no file, no block device.
"""
