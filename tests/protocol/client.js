// A client of vswapd in JavaScript, written from docs/protocol.md alone, and what it tries on a real
// daemon. `node client.js SCENARIO SOCKET`. It exits with 0 if all was as the page says.
//
// Slots are BigInt everywhere: a number of JavaScript would be rounded beyond 2**53.

'use strict';

const assert = require('node:assert/strict');
const net = require('node:net');
const readline = require('node:readline');

const [HELLO, PING, STORE, LOAD, FREE, STATUS, CONTROL, LIST] = [1, 2, 3, 4, 5, 6, 7, 8];
const SLOTS = 1;
const PAGE = 4096;
const HEADER = 24;
const S = {
    OK: 0x000, REJECTED: 0x001, UNKNOWN_OP: 0x103, BAD_LENGTH: 0x201, BAD_SLOT: 0x202,
    DUPLICATE_SLOT: 0x203, UNBACKED: 0x204, BATCH_TOO_LARGE: 0x205, BAD_ARGUMENT: 0x207,
    HELLO_FIRST: 0x208, NO_SPACE: 0x209, SPACE_LOST: 0x20a, SPACE_BUSY: 0x20b, PAGE_LOST: 0x301,
};
const LISTS_SLOTS = new Set([S.REJECTED, S.BAD_SLOT, S.DUPLICATE_SLOT, S.UNBACKED, S.PAGE_LOST]);

const packed = (slots) => {
    const bytes = Buffer.alloc(8 * slots.length);
    slots.forEach((slot, at) => bytes.writeBigUInt64LE(slot, 8 * at));
    return bytes;
};
const unpacked = (bytes) =>
    Array.from({ length: bytes.length / 8 }, (_, at) => bytes.readBigUInt64LE(8 * at));

class Connection {
    constructor(path, lastId = 0n) {
        this.lastId = lastId; // a client that comes back goes on counting
        this.received = Buffer.alloc(0);
        this.unanswered = new Map();
        this.replies = new Map();
        this.ended = new Promise((ended) => {
            this.socket = net.connect(path);
            this.socket.on('data', (bytes) => this.take(bytes));
            this.socket.on('error', () => {}); // what was sent before is still read, to the end
            this.socket.on('close', () => {
                for (const { lost } of this.unanswered.values()) lost(new Error('the end'));
                ended();
            });
        });
    }

    take(bytes) {
        this.received = Buffer.concat([this.received, bytes]);
        while (this.received.length >= HEADER) {
            const length = this.received.readUInt32LE(0);
            if (this.received.length < length) return;
            const frame = this.received.subarray(0, length);
            this.received = this.received.subarray(length);
            const reply = {
                op: frame[5], status: frame.readUInt16LE(6), count: frame.readUInt32LE(8),
                flags: frame.readUInt32LE(12), id: frame.readBigUInt64LE(16),
                body: frame.subarray(HEADER),
            };
            assert.equal(frame[4], 1, 'version');
            const asked = this.unanswered.get(reply.id);
            assert.ok(asked, `a reply to nothing: status ${reply.status}`);
            assert.equal(asked, this.unanswered.values().next().value, 'replies come in order');
            this.unanswered.delete(reply.id);
            const at = LISTS_SLOTS.has(reply.status) ? 8 * reply.count : 0;
            reply.slots = unpacked(reply.body.subarray(0, at));
            reply.text = reply.body.subarray(at).toString();
            asked.done(reply);
        }
    }

    ask(op, body = Buffer.alloc(0), { count = 0, flags = 0 } = {}) {
        const head = Buffer.alloc(HEADER);
        this.lastId += 1n;
        head.writeUInt32LE(HEADER + body.length, 0);
        head[4] = 1;
        head[5] = op;
        head.writeUInt32LE(count, 8);
        head.writeUInt32LE(flags, 12);
        head.writeBigUInt64LE(this.lastId, 16);
        const reply = new Promise((done, lost) => this.unanswered.set(this.lastId, { done, lost }));
        this.socket.write(Buffer.concat([head, body]));
        return reply;
    }

    async hello(said = {}, flags = 0) {
        const reply = await this.ask(HELLO, Buffer.from(JSON.stringify(said)), { flags });
        if (reply.status === S.OK) this.answer = JSON.parse(reply.body);
        return reply;
    }

    async right(op, body, options) { // a request that is to succeed
        const reply = await this.ask(op, body, options);
        assert.equal(reply.status, S.OK, reply.text);
        return reply;
    }

    async store(pages) {
        const count = pages.length / PAGE;
        return unpacked((await this.right(STORE, pages, { count })).body);
    }

    async overwrite(slots, pages) {
        const body = Buffer.concat([packed(slots), pages]);
        const reply = await this.right(STORE, body, { count: slots.length, flags: SLOTS });
        assert.deepEqual(unpacked(reply.body), slots);
    }

    async load(slots) {
        return (await this.right(LOAD, packed(slots), { count: slots.length })).body;
    }

    free(slots) {
        return this.right(FREE, packed(slots), { count: slots.length });
    }

    close() {
        this.socket.end();
        return this.ended;
    }
}

async function open(path, said = {}, flags = 0) {
    const connection = new Connection(path);
    const reply = await connection.hello(said, flags);
    assert.equal(reply.status, S.OK, reply.text);
    return connection;
}

async function refused(path, said, status) { // a HELLO that is not granted
    const connection = new Connection(path);
    assert.equal((await connection.hello(said)).status, status, JSON.stringify(said));
    await connection.close();
}

// Takes up what a connection that has broken had; a shard that was killed comes back by itself.
async function resume(path, old, said = {}) {
    await old.ended; // all replies that have come are read
    const { token, shard } = old.answer;
    for (let pause = 10; ; pause = Math.min(2 * pause, 250)) {
        const connection = new Connection(path, old.lastId);
        const reply = await connection.hello({ token, shard, resume: true, ...said }).catch(() => null);
        if (reply !== null) {
            assert.equal(reply.status, S.OK, reply.text);
            return connection;
        }
        await new Promise((over) => setTimeout(over, pause));
    }
}

const noise = (count) => require('node:crypto').randomBytes(count * PAGE);
const lines = readline.createInterface({ input: process.stdin })[Symbol.asyncIterator]();

async function killed() { // whoever has started this kills the shard meanwhile
    console.log('kill');
    await lines.next();
}

const scenarios = {
    async basics(path) {
        const client = await open(path, { client: 'javascript' });
        const { max_batch: most, shards, shard } = client.answer;
        assert.ok(shard < shards && /^[0-9]+$/.test(client.answer.space));
        const pages = Buffer.concat([noise(5), Buffer.alloc(2 * PAGE), Buffer.alloc(PAGE, 'text')]);
        const slots = await client.store(pages);
        assert.equal(new Set(slots).size, 8);
        assert.ok(slots.every((slot) => slot >> 56n === BigInt(shard)));
        assert.ok((await client.load(slots)).equals(pages));
        const newer = noise(2);
        await client.overwrite([slots[7], slots[0]], newer);
        assert.ok((await client.load([slots[0], slots[7]])).equals(
            Buffer.concat([newer.subarray(PAGE), newer.subarray(0, PAGE)])));
        const listed = await client.right(LIST, packed([0n]), { count: most });
        assert.deepEqual(unpacked(listed.body), slots.slice().sort((a, b) => (a < b ? -1 : 1)));
        // Many at once, answered in their order.
        const loads = await Promise.all(slots.map((slot) => client.load([slot])));
        assert.ok(loads.every((page) => page.length === PAGE));
        await client.free(slots.slice(0, 4));
        assert.equal((await client.right(STATUS)).body[0], '{'.charCodeAt(0));
        await client.close();
    },

    async errors(path) {
        const client = new Connection(path);
        for (const [said, key] of [
            [{ shard: 99 }, 'shard'], [{ shard: '0' }, 'shard'], [{ client: 5 }, 'client'],
            [{ resume: true }, 'resume'], [{ token: 'x' }, 'token'], [{ name: '' }, 'name'],
        ]) {
            const reply = await client.hello(said);
            assert.equal(reply.status, S.BAD_ARGUMENT);
            assert.ok(reply.text.startsWith(key), reply.text);
        }
        assert.equal((await client.hello({ unknown: [1] })).status, S.OK);
        const [first, second] = await client.store(noise(2));
        const gone = await client.store(noise(1));
        await client.free(gone);
        const all = [first, gone[0], second];
        for (const [op, body, options, status] of [
            [LOAD, packed(all), { count: 3 }, S.BAD_SLOT],
            [FREE, packed(all), { count: 3 }, S.BAD_SLOT],
            [STORE, Buffer.concat([packed(all), noise(3)]), { count: 3, flags: SLOTS }, S.BAD_SLOT],
            [FREE, packed([first, first]), { count: 2 }, S.DUPLICATE_SLOT],
            [LOAD, packed(all), { count: 2 }, S.BAD_LENGTH],
            [LOAD, Buffer.alloc(0), { count: 0 }, S.BATCH_TOO_LARGE],
            [LOAD, packed([first]), { count: 1, flags: 128 }, S.BAD_ARGUMENT],
            [PING, Buffer.alloc(0), { count: 1 }, S.BAD_ARGUMENT],
            [99, Buffer.from('whatever'), {}, S.UNKNOWN_OP],
            [CONTROL, Buffer.from('{"verb": "drop", "name": "nobody\'s"}'), {}, S.BAD_ARGUMENT],
        ]) {
            const reply = await client.ask(op, body, options);
            assert.equal(reply.status, status, reply.text);
            if (status === S.BAD_SLOT) assert.deepEqual(reply.slots, gone);
            if (status === S.DUPLICATE_SLOT) assert.deepEqual(reply.slots, [first]);
        }
        await client.right(PING);
        const control = await open(path, {}, 1);
        assert.equal((await control.ask(LOAD, packed([first]), { count: 1 })).status, S.NO_SPACE);
        await control.close();
        await refused(path, { token: '0'.repeat(32) }, S.SPACE_LOST);
        const { token, shard } = client.answer;
        await refused(path, { token, shard }, S.SPACE_BUSY);
        await refused(path, { token }, S.SPACE_BUSY);
        assert.equal((await client.hello()).status, S.HELLO_FIRST);
        await client.ended;
    },

    async resume(path) {
        const first = await open(path, { shard: 1 });
        const content = noise(4);
        const slots = await first.store(content);
        await killed();
        const second = await resume(path, first);
        const { last } = second.answer;
        assert.equal(BigInt(last.request), first.lastId);
        assert.deepEqual(last.slots.map(BigInt), slots);
        assert.ok((await second.load(slots)).equals(content));
        await second.free(slots.slice(2));
        // A store that may be carried out or not: either it is `last`, or it is sent again.
        const more = noise(1);
        const doubtful = second.ask(STORE, more, { count: 1 }).catch(() => null);
        const id = second.lastId;
        await killed();
        const third = await resume(path, second);
        let reply = await doubtful;
        let stored = reply && unpacked(reply.body);
        if (stored === null && BigInt(third.answer.last.request) === id) {
            stored = third.answer.last.slots.map(BigInt);
        }
        stored ??= await third.store(more);
        const kept = [...slots.slice(0, 2), ...stored];
        assert.ok((await third.load(kept)).equals(Buffer.concat([content.subarray(0, 2 * PAGE), more])));
        const listed = await third.right(LIST, packed([0n]), { count: 100 });
        assert.equal(listed.count, 3);
        await third.close();
    },

    async named(path) {
        const name = 'javascript';
        const first = await open(path, { name });
        const content = noise(3);
        const slots = await first.store(content);
        const { token, shards, shard } = first.answer;
        const other = (shard + 1) % shards;
        for (const said of [{ name }, { name, shard }, { name, shard: other }]) {
            await refused(path, said, S.SPACE_BUSY);
        }
        const lane = await open(path, { name, token, shard: other });
        await first.close();
        await refused(path, { name }, S.SPACE_BUSY);
        await lane.close();
        const next = await open(path, { name });
        assert.ok((await next.load(slots)).equals(content));
        await next.close();
        await refused(path, { name, token, shard, resume: true }, S.SPACE_LOST);
        const done = await open(path, {}, 1);
        const body = Buffer.from(JSON.stringify({ verb: 'drop', name }));
        assert.equal(JSON.parse((await done.right(CONTROL, body)).body).freed_slots, 3);
        await done.close();
    },
};

scenarios[process.argv[2]](process.argv[3]).then(() => process.exit(0), (error) => {
    console.error(error);
    process.exit(1);
});
