// The broker's messages, protocol version 1: fixed structs, little endian, one a packet of a SOCK_SEQPACKET Unix socket.
// docs/broker.md describes them; drivers/broker_wire.py is the same for Python, which also writes the two texts (what the
// broker serves, and how it is) that this side only passes on.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace everett::wire {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the protocol is little endian, and so is this code");

constexpr uint32_t kMagic = 0x31425645;  // "EVB1"
constexpr uint16_t kVersion = 1;
constexpr size_t kMostBytes = 4096;     // a message, header included
constexpr size_t kMostDraw = 2048;      // bytes of one DRAW
constexpr size_t kMostText = 2048;      // of the two texts

enum Type : uint16_t {
  hello = 1,    // client: Hello
  draw = 2,     // client: Draw; one at a time
  welcome = 3,  // broker: Welcome, then what it serves; with a ring: memfd and eventfd beside it
  bytes = 4,    // broker: Draw, then the bytes
  state = 5,    // broker: State, then how it is
  refused = 6,  // broker: Refusal, then why as text; then it closes
};

struct Header {
  uint32_t magic;
  uint16_t version, type;
  uint32_t length;  // of the whole message
  uint32_t zero;
};
struct Hello {
  uint32_t ring;  // 1: shared memory is wanted; 0: draws by message
  uint32_t zero;
};
struct Draw {
  uint32_t n;    // bytes: 32 to 2048, a multiple of 32
  uint32_t tag;  // comes back with them
};
struct Welcome {
  uint64_t client;      // its number, in the broker's logs
  uint32_t ring_bytes;  // 0: none was wanted
  uint32_t state;       // Supply
};
struct State {
  uint32_t state;  // Supply
  uint32_t zero;
};
enum class Refused : uint32_t { version = 1, malformed = 2, not_allowed = 3, too_many = 4, no_memory = 5 };
struct Refusal {
  uint32_t why;
  uint32_t zero;
};

}  // namespace everett::wire
