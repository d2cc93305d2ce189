// What every ring's consumers can do with takes alone; see ring_reader.h.
#include "ring_reader.h"

#include <algorithm>

#include "deadline.h"
#include "secret_pages.h"

namespace everett {

size_t RingReader::discard(size_t n, double timeout_s) {
  uint8_t piece[65536];
  const auto deadline = deadline_in(timeout_s);
  size_t done = 0;
  while (done < n) {
    // A quarter: whoever fills the ring works on the rest meanwhile.
    size_t now = std::min({n - done, sizeof piece, std::max<size_t>(capacity() / 4, 1)});
    if (take(piece, now, seconds_left(deadline)) != Take::ok) break;
    done += now;
  }
  wipe(piece, sizeof piece);
  return done;
}

}  // namespace everett
