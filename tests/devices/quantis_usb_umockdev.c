// An emulated Quantis USB below libusb: umockdev answers the ioctls that libusb sends to a device's node.
//
// Runs under umockdev-wrapper as a process of its own. It prints the folder of its test bed (UMOCKDEV_DIR for the
// programs that shall see the device), then obeys one command a line on stdin, each answered by "ok" or "error ...":
//
//   plug SERIAL SEED   plug the device in: port 1-1, a new address each time, the stream of SEED from its start
//   unplug
//   fault KIND BYTES   the first transfer after that many bytes since plugging: short, stall, io, silence, unplug
//   speak              ends a silence
//   status N / ais31 N / rate BYTES_PER_S (0: as fast as it is read) / packets 1 (one packet a transfer)
//   stuck BYTES / biased BYTES: from there on all bytes are 0x55 / each bit is 1 with probability 1/8
//   driver NAME        a kernel driver binds the interface, until it is unplugged
//   served             answers "ok BYTES"
//
// Facts: ID Quantique's library 20.2.4, QUSB, linux/usbdevice_fs.h. Traps of umockdev 0.17: the hexadecimal of a node is
// upper case, and a handler can be attached to a node once only.
#include <errno.h>
#include <glib.h>
#include <linux/usbdevice_fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <time.h>
#include <umockdev.h>

#include "seeded_bytes.h"

enum { kPacket = 512, kFifo = 4 * kPacket, kQueue = 64, kEndpoint = 0x86 };
enum fault { kNone, kShort, kStall, kIo, kSilence, kUnplug };
static const char* const kFaults[] = {"none", "short", "stall", "io", "silence", "unplug", NULL};
#define DEVICE_HEX "12010002FFFFFF40BA0A0201000101020301"
#define HUB_HEX "12010002090001406B1D0200020603020101" "0902190001010080" "00" "090400000109000000" "0705810304000C"
#define CONFIG_HEX "0902190001010080" "4B" "0904000001FFFFFF00" "07058602000200"

#define INTERFACE_PATH "/sys/devices/usb1/1-1/1-1:1.0"

static GMutex lock;
static UMockdevTestbed* bed;
static UMockdevIoctlBase* handler;
// Of the device.
static int plugged, devnum = 1, halted, silent, status = 1, ais31, one_packet, bound;
static char syspath[64];
static uint64_t seed, served, stuck_at = UINT64_MAX, biased_from = UINT64_MAX, fault_at;
static enum fault fault;
static double rate, made_at;
static UMockdevIoctlClient* claimed_by;  // whose interface it is
static GThread* remover;  // umockdev breaks a client's connection if the device is removed inside its ioctl
// Submitted and not yet reaped, in order; done: the device has answered.
static struct urb {
  UMockdevIoctlData* data;
  UMockdevIoctlClient* client;
  int done;
} queue[kQueue];
static unsigned queued;

static double now_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

static void release(void) { g_clear_object(&claimed_by); }

static gpointer remove_from_bed(gpointer unused) {
  umockdev_testbed_remove_device(bed, INTERFACE_PATH);
  umockdev_testbed_uevent(bed, syspath, "remove");
  umockdev_testbed_remove_device(bed, syspath);
  return unused;
}

static void random_bytes(unsigned char* out, size_t n) {
  seeded_bytes(seed, served, out, n);
  unsigned char* other = malloc(n);
  for (int k = 1; k <= 2 && served + n > biased_from; k++) {
    seeded_bytes((seed + k) * 7919, served, other, n);
    for (size_t i = 0; i < n; i++)
      if (served + i >= biased_from) out[i] &= other[i];
  }
  free(other);
  for (size_t i = 0; i < n; i++)
    if (served + i >= stuck_at) out[i] = 0x55;
}

static int answer_string(int index, unsigned char* out) {
  static const char* const kStrings[] = {NULL, "id Quantique", "Quantis USB", NULL};
  if (index == 0) return memcpy(out, "\x04\x03\x09\x04", 4), 4;
  if (index > 2 || !kStrings[index]) return -EPIPE;  // the serial is asked of sysfs, as lsusb does
  int n = 2;
  for (const char* c = kStrings[index]; *c; c++) out[n++] = (unsigned char)*c, out[n++] = 0;
  out[0] = (unsigned char)n;
  out[1] = 3;
  return n;
}

// The answer to a control request, into `out`; its length, or a negative errno.
static int control(const unsigned char* setup, unsigned char* out) {
  int type = setup[0], request = setup[1], value = setup[2] | setup[3] << 8, index = setup[4] | setup[5] << 8;
  int length = setup[6] | setup[7] << 8;
  if (type == 0x80 && request == 6 && value >> 8 == 3) {
    unsigned char whole[256];
    int n = answer_string(value & 0xFF, whole);
    if (n > length) n = length;
    if (n > 0) memcpy(out, whole, (size_t)n);
    return n;
  }
  if (value || index) return -EPIPE;
  uint32_t answer;
  int bytes = 1;
  if (type == 0xC1) {
    switch (request) {
      case 0x10: answer = 0x00020008, bytes = 4; break;
      case 0x13: answer = (uint32_t)status; break;
      case 0x14: case 0x15: answer = 1; break;
      case 0x16: answer = 4000, bytes = 4; break;
      case 0x17: answer = (uint32_t)ais31; break;
      default: return -EPIPE;
    }
    if (bytes > length) bytes = length;
    memcpy(out, &answer, (size_t)bytes);
    return bytes;
  }
  if (type != 0x41 || length) return -EPIPE;
  switch (request) {
    case 0x11: status = 0; return 0;
    case 0x12: status = 1; return 0;
    case 0x18: ais31 = 0; return 0;
  }
  return -EPIPE;
}

// Answers a bulk transfer if its bytes are there: 1, else 0.
static int bulk(struct usbdevfs_urb* urb, unsigned char* out) {
  int want = urb->buffer_length;
  if (one_packet && want > kPacket) want = kPacket;
  if (served >= fault_at && fault != kNone) {
    enum fault now = fault;
    fault = kNone;
    if (now == kSilence) silent = 1;
    if (now == kStall) halted = 1;
    if (now == kShort) want -= 256;
    if (now == kUnplug) {
      plugged = 0;
      remover = g_thread_new("unplug", remove_from_bed, NULL);
      return 0;
    }
    if (now == kIo) return urb->status = -EPROTO, urb->actual_length = 0, 1;
  }
  if (halted) return urb->status = -EPIPE, urb->actual_length = 0, 1;
  if (urb->buffer_length % kPacket) return urb->status = -EOVERFLOW, urb->actual_length = 0, 1;
  if (silent) return 0;
  if (rate > 0) {
    double now = now_s();
    if (made_at < now - kFifo / rate) made_at = now - kFifo / rate;  // what found the buffer full was not made
    if (made_at + want / rate > now) return 0;
    made_at += want / rate;
  }
  random_bytes(out, (size_t)want);
  served += (uint64_t)want;
  urb->status = 0;
  urb->actual_length = want;
  return 1;
}

static struct usbdevfs_urb* of(const struct urb* u) { return (struct usbdevfs_urb*)u->data->data; }

static UMockdevIoctlData* buffer_of(const struct urb* u) {
  struct usbdevfs_urb* s = of(u);
  return umockdev_ioctl_data_resolve(u->data, offsetof(struct usbdevfs_urb, buffer), (gsize)s->buffer_length, NULL);
}

static void answer(struct urb* u) {
  struct usbdevfs_urb* s = of(u);
  UMockdevIoctlData* buffer = buffer_of(u);
  if (s->type == USBDEVFS_URB_TYPE_CONTROL) {
    int n = control(buffer->data, buffer->data + 8);
    s->status = n < 0 ? n : 0;
    s->actual_length = n < 0 ? 0 : n;
    u->done = 1;
  } else if (s->endpoint == kEndpoint) {
    u->done = bulk(s, buffer->data);
  } else {
    s->status = -ENOENT;
    u->done = 1;
  }
  umockdev_ioctl_data_unref(buffer);
}

static void forget(unsigned i) {
  umockdev_ioctl_data_unref(queue[i].data);
  g_object_unref(queue[i].client);
  memmove(&queue[i], &queue[i + 1], (--queued - i) * sizeof queue[0]);
}

static int submit(UMockdevIoctlData* arg, UMockdevIoctlClient* client) {
  for (unsigned i = queued; i-- > 0;)
    if (!umockdev_ioctl_client_get_connected(queue[i].client)) forget(i);
  if (queued == kQueue) return ENOMEM;
  struct urb* u = &queue[queued];
  u->data = umockdev_ioctl_data_resolve(arg, 0, sizeof(struct usbdevfs_urb), NULL);
  u->client = g_object_ref(client);
  u->done = 0;
  queued++;
  answer(u);
  if (!plugged) forget(queued - 1);  // refused, so never reaped
  return plugged ? 0 : ENODEV;
}

static int reap(UMockdevIoctlData* arg, const UMockdevIoctlClient* client) {
  for (unsigned i = 0; i < queued; i++) {
    if (queue[i].client != client) continue;
    if (!queue[i].done && plugged) answer(&queue[i]);
    if (!queue[i].done && plugged) continue;
    if (!plugged && !queue[i].done) of(&queue[i])->status = -ENODEV, of(&queue[i])->actual_length = 0;
    UMockdevIoctlData* where = umockdev_ioctl_data_resolve(arg, 0, sizeof(void*), NULL);
    umockdev_ioctl_data_set_ptr(where, 0, queue[i].data);
    umockdev_ioctl_data_unref(where);
    forget(i);
    return 0;
  }
  return plugged ? EAGAIN : ENODEV;
}

static int discard(UMockdevIoctlData* arg) {
  for (unsigned i = 0; i < queued; i++)
    if (queue[i].data->client_addr == *(unsigned long*)arg->data && !queue[i].done) {
      of(&queue[i])->status = -ENOENT;
      of(&queue[i])->actual_length = 0;
      queue[i].done = 1;
      return 0;
    }
  return EINVAL;
}

// Whether another process or a kernel driver has the interface. umockdev emits no "client-vanished" for one that was killed.
static int claimed_by_other(UMockdevIoctlClient* client) {
  if (claimed_by && !umockdev_ioctl_client_get_connected(claimed_by)) release();
  return bound || (claimed_by && claimed_by != client);
}

static int serve(UMockdevIoctlClient* client, unsigned long request) {
  UMockdevIoctlData* arg = umockdev_ioctl_client_get_arg(client);
  switch (request) {
    case USBDEVFS_REAPURB: case USBDEVFS_REAPURBNDELAY: return reap(arg, client);
    case USBDEVFS_DISCARDURB: return discard(arg);
  }
  if (!plugged) return ENODEV;
  switch (request) {
    case USBDEVFS_GET_CAPABILITIES: {
      UMockdevIoctlData* where = umockdev_ioctl_data_resolve(arg, 0, 4, NULL);
      *(uint32_t*)where->data =
          USBDEVFS_CAP_BULK_CONTINUATION | USBDEVFS_CAP_NO_PACKET_SIZE_LIM | USBDEVFS_CAP_REAP_AFTER_DISCONNECT;
      umockdev_ioctl_data_unref(where);
      return 0;
    }
    case USBDEVFS_GETDRIVER: return ENODATA;
    case USBDEVFS_SETCONFIGURATION: return claimed_by_other(client) ? EBUSY : 0;
    case USBDEVFS_CLAIMINTERFACE:
      if (claimed_by_other(client)) return EBUSY;
      if (!claimed_by) claimed_by = g_object_ref(client);
      return 0;
    case USBDEVFS_RELEASEINTERFACE:
      if (claimed_by == client) release();
      return 0;
    case USBDEVFS_CLEAR_HALT: halted = 0; return 0;
    case USBDEVFS_SUBMITURB: return submit(arg, client);
  }
  fprintf(stderr, "emulated Quantis: unexpected ioctl %#lx\n", request);
  return ENOTTY;
}

static gboolean on_ioctl(UMockdevIoctlBase* base, UMockdevIoctlClient* client, gpointer unused) {
  (void)base, (void)unused;
  g_mutex_lock(&lock);
  int error = serve(client, umockdev_ioctl_client_get_request(client));
  g_mutex_unlock(&lock);
  umockdev_ioctl_client_complete(client, error ? -1 : 0, error);
  return TRUE;
}

static const char* add(const char* text, const char* node) {
  GError* error = NULL;
  if (!umockdev_testbed_add_from_string(bed, text, &error)) return error->message;
  if (node && !umockdev_testbed_attach_ioctl(bed, node, handler, &error)) return error->message;
  return NULL;
}

static const char* plug(const char* serial, uint64_t new_seed) {
  char text[2048], node[64];
  if (plugged) return "it is plugged in";
  if (remover) g_thread_join(remover), remover = NULL;
  devnum++;
  snprintf(node, sizeof node, "/dev/bus/usb/001/%03d", devnum);
  snprintf(syspath, sizeof syspath, "/sys/devices/usb1/1-1");
  snprintf(text, sizeof text,
           "P: /devices/usb1/1-1\nN: bus/usb/001/%03d=%s%s\nE: DEVNAME=%s\nE: DEVTYPE=usb_device\nE: SUBSYSTEM=usb\n"
           "E: BUSNUM=001\nE: DEVNUM=%03d\nA: bConfigurationValue=1\\n\nA: busnum=1\\n\nA: devnum=%d\\n\nA: speed=480\\n\n"
           "A: idVendor=0aba\\n\nA: idProduct=0102\\n\nA: product=Quantis USB\\n\nA: serial=%s\\n\nH: descriptors=%s%s\n",
           devnum, DEVICE_HEX, CONFIG_HEX, node, devnum, devnum, serial, DEVICE_HEX, CONFIG_HEX);
  const char* wrong = add(text, node);
  if (!wrong) wrong = add("P: /devices/usb1/1-1/1-1:1.0\nE: DEVTYPE=usb_interface\nE: SUBSYSTEM=usb\n", NULL);
  if (wrong) return wrong;
  g_mutex_lock(&lock);
  plugged = 1;
  halted = silent = bound = 0;
  release();
  while (queued) forget(queued - 1);
  seed = new_seed;
  served = 0;
  fault = kNone;
  stuck_at = biased_from = UINT64_MAX;
  made_at = now_s();
  g_mutex_unlock(&lock);
  umockdev_testbed_uevent(bed, syspath, "add");
  return NULL;
}

static const char* obey(const char* line) {
  char word[64] = "", name[64] = "";
  unsigned long long number = 0;
  if (sscanf(line, "plug %63s %llu", name, &number) == 2) return plug(name, number);
  g_mutex_lock(&lock);
  const char* wrong = NULL;
  if (sscanf(line, "fault %63s %llu", name, &number) == 2) {
    int kind = 0;
    while (kFaults[kind] && strcmp(kFaults[kind], name)) kind++;
    if (kFaults[kind])
      fault = (enum fault)kind, fault_at = number;
    else
      wrong = "unknown fault";
  } else if (sscanf(line, "driver %63s", name) == 1) {
    char target[128];
    snprintf(target, sizeof target, "../../../../bus/usb/drivers/%s", name);
    umockdev_testbed_set_attribute_link(bed, INTERFACE_PATH, "driver", target);
    bound = 1;
  } else if (sscanf(line, "%63s %llu", word, &number) == 2) {
    if (!strcmp(word, "status")) status = (int)number;
    else if (!strcmp(word, "ais31")) ais31 = (int)number;
    else if (!strcmp(word, "rate")) rate = (double)number, made_at = now_s();
    else if (!strcmp(word, "packets")) one_packet = number == 1;
    else if (!strcmp(word, "stuck")) stuck_at = number;
    else if (!strcmp(word, "biased")) biased_from = number;
    else wrong = "unknown command";
  } else if (!strcmp(line, "unplug\n")) {
    plugged = 0;
  } else if (!strcmp(line, "speak\n")) {
    silent = 0;
  } else {
    wrong = "unknown command";
  }
  g_mutex_unlock(&lock);
  if (!strcmp(line, "unplug\n")) remove_from_bed(NULL);
  return wrong;
}

int main(void) {
  bed = umockdev_testbed_new();
  handler = umockdev_ioctl_base_new();
  g_signal_connect(handler, "handle-ioctl", G_CALLBACK(on_ioctl), NULL);
  const char* wrong = add(
      "P: /devices/usb1\nN: bus/usb/001/001=" HUB_HEX "\nE: DEVNAME=/dev/bus/usb/001/001\n"
      "E: DEVTYPE=usb_device\nE: SUBSYSTEM=usb\nE: BUSNUM=001\nE: DEVNUM=001\nA: bConfigurationValue=1\\n\n"
      "A: busnum=1\\n\nA: devnum=1\\n\nA: speed=480\\n\nH: descriptors=" HUB_HEX "\n", NULL);
  if (wrong) return fprintf(stderr, "emulated Quantis: %s\n", wrong), 1;
  printf("%s\n", umockdev_testbed_get_root_dir(bed));
  fflush(stdout);
  char line[256];
  while (fgets(line, sizeof line, stdin)) {
    if (!strcmp(line, "served\n")) {
      g_mutex_lock(&lock);
      printf("ok %llu\n", (unsigned long long)served);
      g_mutex_unlock(&lock);
    } else {
      wrong = obey(line);
      printf(wrong ? "error %s\n" : "ok\n", wrong);
    }
    fflush(stdout);
  }
  g_object_unref(bed);
  return 0;
}
