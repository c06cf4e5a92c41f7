"""glibc's heap: told to keep what is freed, and asked what it takes for the tensors of a computation.

It takes more than what is in use at once: `posix_memalign`, by which torch asks, wants 96 bytes more than it gives, so that
what a tensor leaves is too small for the next of its size unless it grows together with its neighbours, from which the
small objects of other tensors keep it. How much is lost depends on the order of it all. So `growth` asks the heap of a
process of its own for places of these sizes in this order, with small objects whose sizes and numbers are drawn from what a
trace showed. A place that nobody writes to takes no memory.
"""

import ctypes
import platform
import random
import subprocess
import sys
from collections.abc import Iterable, Sequence

from prlhf.train.malloc import keep_freed_memory

FAR = 2**40  # bytes between the heap and what is mapped, on 64 bits, whether that lies above it or below
REFUSED = "refused"
# Bytes that torch 2.13 asks malloc for beside a tensor's values, as a trace of its calls in an update with LoRA has them.
STORAGE_OBJECTS = (96,)  # StorageImpl
TENSOR_OBJECTS = (176, 24, 184)  # TensorImpl, its version counter, what autograd knows of it
NODES = (480, 488, 488, 488, 488, 512, 536, 544, 640, 640, 736, 736)  # of autograd's graph: one of these,
LISTS = (16, 16, 16, 16, 16, 24, 24, 32, 32)  # and three to five of these: what it keeps, and where it leads
Event = tuple[str, int, int]


"""("storage", number, bytes), ("tensor", number, 0), ("node", number, 0): something new; ("freed", number, 0): its end.

("sum", number, bytes) is a storage that takes the place of one of its size, if one is freed before the next is made.
"""


def twice(events: Sequence[Event]) -> list[Event]:
    """The events, and once more those of what they free: from the second time on a heap has holes. The rest stays."""
    freed = {number for what, number, _ in events if what == "freed"}
    return [*events, *(event for event in events if event[1] in freed)]


def growth(events: Iterable[Event], kept: bool) -> int | None:
    """Bytes by which the heap grows at most while `events` happen; None without glibc, or where it gives no more.

    kept: after `keep_freed_memory`.
    """
    if platform.libc_ver()[0] != "glibc":
        return None
    lines = "".join(f"{what} {number} {size}\n" for what, number, size in events)
    command = [sys.executable, "-I", __file__, *(["kept"] if kept else [])]
    done = subprocess.run(command, input=lines, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout) if done.stdout.strip() != REFUSED else None


def replay(events: Iterable[Event]) -> int:
    """`growth` of this process's own heap; MemoryError where it gives no more. Needs glibc."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.sbrk.argtypes = [ctypes.c_ssize_t]
    libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
    draw = random.Random(0)
    sizes: dict[int, int] = {}  # of storages
    places: dict[int, list[int]] = {}
    mapped: dict[int, int] = {}  # bytes of storages that are mapped one by one, far from the heap
    start = libc.sbrk(0)
    most = beside = 0
    waiting: int | None = None  # a sum without a place

    def allocate(number: int) -> None:
        nonlocal most, beside
        objects = [libc.malloc(size) for size in STORAGE_OBJECTS]
        place = ctypes.c_void_p()
        if libc.posix_memalign(ctypes.byref(place), 64, sizes[number]):
            raise MemoryError
        places[number] = [place.value, *objects]
        end = libc.sbrk(0)
        if abs(place.value - end) > FAR:
            mapped[number] = sizes[number]
            beside += sizes[number]
        most = max(most, end - start + beside)

    for what, number, size in events:
        if what in ("storage", "sum"):
            sizes[number] = size
            if waiting is not None:
                allocate(waiting)
            waiting = number if what == "sum" else None
            if what == "storage":
                allocate(number)
        elif what == "tensor":
            places[number] = [libc.malloc(size) for size in TENSOR_OBJECTS]
        elif what == "node":
            objects = [draw.choice(NODES), *draw.choices(LISTS, k=draw.randint(3, 5))]
            places[number] = [libc.malloc(size) for size in objects]
        elif number == waiting:
            waiting = None
        elif waiting is not None and sizes.get(number) == sizes[waiting]:
            places[waiting] = places.pop(number)
            if number in mapped:
                mapped[waiting] = mapped.pop(number)
            waiting = None
        else:
            beside -= mapped.pop(number, 0)
            for place in places.pop(number):
                libc.free(place)
    if waiting is not None:
        allocate(waiting)
    return most


if __name__ == "__main__":
    if sys.argv[1:] == ["kept"]:
        keep_freed_memory()
    read = [(what, int(number), int(size)) for what, number, size in map(str.split, sys.stdin)]
    try:
        print(replay(read))
    except MemoryError:
        print(REFUSED)
