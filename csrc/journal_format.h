// How a journal's records lie in its file, little endian; everett_cuda/journal_file.py reads them, docs/journal.md
// explains them. A record: u32 length of what follows, body, u32 CRC-32C of both. The body is a head, then data; in an
// encrypted journal it is the ciphertext of that with its tag of 16 bytes, its number in the file being the nonce.
#pragma once

#include "law/word.h"

namespace everett {

enum class RecordType : u8 {
  key = 1,    // a fresh or stretched key; data: the key
  draw = 2,   // shared, reused or replayed: a key that stands in a record before
  words = 3,  // direct words; data: the bytes
  step = 4,   // a step ended; number: how many have
  state = 5,  // data: the state of torch's generator of `device`, as torch serializes it
  load = 6,   // counters continue from a checkpoint: number, ticket; data: JSON
  close = 7,  // the end; number: records before this one; data: JSON
  use = 8,    // a GPU's op uses words that were copied there; number: of its granules
  drop = 9,   // the words on a GPU that were not used were destroyed there
  group = 10, // a family's key that is shared by a group of processes; data: the key, which `shared` draws then have
};

struct RecordHead {
  RecordType type;
  u8 drawn = 0;      // key, draw: 0 fresh, 1 stretched, 2 shared, 3 reused, 4 replayed
  u8 family = 0;     // key, draw, group: 0 rank, 1 world; a key that is itself asked for: 2 for captured graphs, 3 to share
  u8 store = 0;      // words: 0 the host, 1 a GPU's pool, 2 its lane for captured graphs
  i32 device = -1;   // -1 the CPU, else the CUDA index
  u32 generator = 0;
  u32 zero = 0;
  u64 ticket = 0;    // key, draw: the number of the draw; words: of the take; step: draws up to there
  u64 number[2] = {0, 0};  // key, draw: the nonce
};
static_assert(sizeof(RecordHead) == 40, "the layout of the file");

}  // namespace everett
