// One party of a garbled circuit, on Node: node garbled_worker.mjs RANK FOLDER OWN_ADDRESS OTHER_ADDRESS MODULE
//
// RANK 0 is the client, 1 the server, which listens at OWN_ADDRESS. FOLDER belongs to this party: circuit.txt (Bristol
// format, known to both), input.json ({"bits": its own, "bits_per_party": of both}), and in the end output.json (the
// output's bits). MODULE is emp-wasm's index.js. Says `ready` when connected, waits for `go`, and says `done`; its
// errors go to its error output. garbled_circuits.py starts both and says what this hides.

import fs from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import readline from 'node:readline';
import { pathToFileURL } from 'node:url';

const HEAD_BYTES = 5; // length of what follows (4, little-endian), channel (1)

async function main([rankText, folder, own, other, module]) {
  const rank = Number(rankText);
  const { secureMPC, BufferedIO } = await import(pathToFileURL(module).href);
  const circuit = fs.readFileSync(path.join(folder, 'circuit.txt'), 'utf8');
  const input = JSON.parse(fs.readFileSync(path.join(folder, 'input.json'), 'utf8'));
  const socket = await (rank === 0 ? connected(other) : accepted(own));
  socket.setNoDelay(true);
  const io = new BufferedIO(1 - rank, (party, channel, data) => socket.write(framed(channel, data)));
  socket.on('data', unframing((channel, data) => io.accept(channel, data)));
  const closed = new Promise((resolve) => socket.on('close', resolve));
  socket.on('error', fail);
  let over = false;
  closed.then(() => over || fail(new Error('the other party hung up')));

  const lines = readline.createInterface({ input: process.stdin });
  process.stdout.write('ready\n');
  const { value } = await lines[Symbol.asyncIterator]().next();
  if (value !== 'go') throw new Error('whoever started this party is gone');
  const output = await secureMPC({
    party: rank,
    size: 2,
    circuit,
    inputBits: Uint8Array.from(input.bits),
    inputBitsPerParty: input.bits_per_party,
    io,
    mode: 'mpc', // the package's default: its '2pc' fails on circuits of some 40,000 gates ("FEQ error")
  });
  over = true;
  fs.writeFileSync(path.join(folder, 'output.json'), JSON.stringify(Array.from(output)));
  process.stdout.write('done\n');
  socket.end();
  await closed;
  lines.close();
  process.exit(0);
}

function connected(address) {
  const [host, port] = address.split(':');
  return new Promise((resolve, reject) => {
    const socket = net.connect(Number(port), host, () => resolve(socket));
    socket.on('error', reject);
  });
}

function accepted(address) {
  const [host, port] = address.split(':');
  return new Promise((resolve, reject) => {
    const server = net.createServer((socket) => {
      server.close();
      resolve(socket);
    });
    server.on('error', reject);
    server.listen(Number(port), host);
  });
}

function framed(channel, data) {
  const frame = Buffer.alloc(HEAD_BYTES + data.length);
  frame.writeUInt32LE(data.length);
  frame[4] = channel.charCodeAt(0);
  frame.set(data, HEAD_BYTES);
  return frame;
}

function unframing(deliver) {
  let pieces = [];
  let held = 0;
  let wanted = HEAD_BYTES;
  return (piece) => {
    pieces.push(piece);
    held += piece.length;
    while (held >= wanted) {
      const bytes = pieces.length === 1 ? pieces[0] : Buffer.concat(pieces);
      const whole = HEAD_BYTES + bytes.readUInt32LE();
      if (held >= whole) {
        deliver(String.fromCharCode(bytes[4]), new Uint8Array(bytes.subarray(HEAD_BYTES, whole)));
        pieces = [bytes.subarray(whole)];
        held -= whole;
        wanted = HEAD_BYTES;
      } else {
        pieces = [bytes];
        wanted = whole;
      }
    }
  };
}

function fail(error) {
  process.stderr.write(`${String(error?.message ?? error).split('\n')[0]}\n`, () => process.exit(1));
}

process.on('uncaughtException', fail);
process.on('unhandledRejection', fail);
main(process.argv.slice(2)).catch(fail);
