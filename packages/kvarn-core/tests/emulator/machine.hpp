// A multiprocessor on the CPU: every CUDA thread is a fiber, lanes of a warp meet where the real
// instructions make them meet. Meant to find errors: shared memory starts as NaN, a bulk copy
// spoils its target until somebody has waited for it, lanes run in an order that the seed decides,
// and whatever a GPU would leave undefined ends the launch with a message.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace emulator {

constexpr int WARP = 32;
constexpr size_t STACK_BYTES = 256 * 1024;
constexpr unsigned SHARED_BASE = 1024;       // address 0 is never valid
constexpr unsigned STATIC_BASE = 1u << 20;   // variables declared __shared__
constexpr unsigned char POISON = 0xff;       // NaN in every floating type

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

struct Copy {
    unsigned to, bytes, barrier;
    const unsigned char* from;
};

struct Barrier {
    unsigned arrivals, pending;
    long long bytes = 0;
    unsigned phase = 0;
};

struct Meeting {  // of the lanes of a warp or of the threads of a CTA
    const char* name = nullptr;
    int arrived = 0;
    unsigned generation = 0;
    const void* in[1024];
    void* out[1024];
};

struct Fiber {
    void* stack_pointer = nullptr;
    unsigned char* stack = nullptr;
    bool done = false;
    const unsigned* waits_for = nullptr;  // runs again when this differs from `seen`
    unsigned seen = 0;
};

struct Range {
    const unsigned char* begin;
    size_t bytes;
};

extern "C" void kvarn_emulator_switch(void** save, void* load);
#if defined(__x86_64__)
asm(".text\n.globl kvarn_emulator_switch\nkvarn_emulator_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
constexpr int SAVED = 6;  // registers below the return address
#elif defined(__aarch64__)
asm(".text\n.globl kvarn_emulator_switch\nkvarn_emulator_switch:\n"
    "sub sp,sp,#160\nstp x19,x20,[sp]\nstp x21,x22,[sp,#16]\nstp x23,x24,[sp,#32]\n"
    "stp x25,x26,[sp,#48]\nstp x27,x28,[sp,#64]\nstp x29,x30,[sp,#80]\n"
    "stp d8,d9,[sp,#96]\nstp d10,d11,[sp,#112]\nstp d12,d13,[sp,#128]\nstp d14,d15,[sp,#144]\n"
    "mov x9,sp\nstr x9,[x0]\nmov sp,x1\n"
    "ldp x19,x20,[sp]\nldp x21,x22,[sp,#16]\nldp x23,x24,[sp,#32]\n"
    "ldp x25,x26,[sp,#48]\nldp x27,x28,[sp,#64]\nldp x29,x30,[sp,#80]\n"
    "ldp d8,d9,[sp,#96]\nldp d10,d11,[sp,#112]\nldp d12,d13,[sp,#128]\nldp d14,d15,[sp,#144]\n"
    "add sp,sp,#160\nret\n");
#else
#error "the emulator has no context switch for this processor"
#endif

class Machine {
  public:
    Index thread, block, block_size, grid_size;  // of the running fiber
    std::vector<unsigned char> shared;           // aligned part begins at shared_data()
    std::vector<Range> memory;                   // what bulk copies may read
    std::vector<Copy> copies;                    // in flight
    std::map<unsigned, Barrier> barriers;
    std::string message;

    unsigned char* shared_data() {
        return reinterpret_cast<unsigned char*>((uintptr_t(shared.data()) + 1023) & ~uintptr_t(1023));
    }

    template <class Body>
    bool run(Index grid, unsigned threads, unsigned shared_bytes, unsigned seed, Body body) {
        message.clear();
        random_ = seed * 2654435761u + 12345;
        grid_size = grid;
        block_size = {threads, 1, 1};
        shared_bytes_ = shared_bytes;
        if (threads % WARP || threads > 1024) return message = "threads are not whole warps", false;
        body_ = [](void* b) { (*static_cast<Body*>(b))(); };
        body_data_ = &body;
        std::vector<unsigned> order(grid.x * grid.y * grid.z);
        for (unsigned i = 0; i < order.size(); i++) order[i] = i;
        shuffle(order);  // CTAs end in any order
        for (unsigned i : order) {
            block = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
            if (!run_cta()) return false;
        }
        return true;
    }

    [[noreturn]] void fail(const std::string& what) {
        if (message.empty()) {
            char where[96];
            snprintf(where, sizeof where, " (block %u, thread %u)", block.x, thread.x);
            message = what + where;
        }
        failed_ = true;
        void* dead;
        kvarn_emulator_switch(&dead, main_);
        __builtin_unreachable();
    }

    void wait(const unsigned* word, unsigned seen) {
        Fiber& me = fibers_[thread.x];
        me.waits_for = word;
        me.seen = seen;
        to_main(me);
    }

    void yield() { wait(nullptr, 0); }

    // All lanes bring a value and get one; `compute` runs once, when the last lane has come.
    template <class Out, class In, class Compute>
    Out meet(Meeting& where, int members, int me, const char* name, const In& in, Compute compute) {
        Out out{};
        if (where.arrived && strcmp(where.name, name))
            fail(std::string("threads meet at ") + where.name + " and " + name);
        where.name = name;
        where.in[me] = &in;
        where.out[me] = &out;
        if (++where.arrived == members) {
            compute(reinterpret_cast<const In* const*>(where.in), reinterpret_cast<Out* const*>(where.out));
            where.arrived = 0;
            where.generation++;
        } else {
            wait(&where.generation, where.generation);
        }
        return out;
    }

    template <class Out, class In, class Compute>
    Out warp(const char* name, const In& in, Compute compute) {
        return meet<Out>(warps_[thread.x / WARP], WARP, thread.x % WARP, name, in, compute);
    }

    template <class Out, class In, class Compute>
    Out cta(const char* name, const In& in, Compute compute) {
        return meet<Out>(cta_, int(block_size.x), int(thread.x), name, in, compute);
    }

    unsigned threads() const { return block_size.x; }

    unsigned char* at(unsigned address, unsigned bytes, bool reads) {
        if (address % (bytes < 16 ? bytes : 16)) fail("misaligned access to shared memory");
        if (random() % 128 == 0) yield();  // others may come first
        if (reads)
            for (const Copy& c : copies)
                if (address < c.to + c.bytes && c.to < address + bytes)
                    fail("shared memory is read while a bulk copy fills it");
        return inside(address, bytes);
    }

    unsigned char* inside(unsigned address, unsigned bytes) {
        if (address >= STATIC_BASE) {
            if (address - STATIC_BASE + bytes > static_bytes()) fail("beyond static shared memory");
            return static_data() + (address - STATIC_BASE);
        }
        if (address < SHARED_BASE || address - SHARED_BASE + bytes > shared_bytes_)
            fail("access beyond the shared memory of the launch");
        return shared_data() + (address - SHARED_BASE);
    }

    unsigned address_of(const void* p) {
        auto* q = static_cast<const unsigned char*>(p);
        if (q >= shared_data() && q <= shared_data() + shared_bytes_)
            return SHARED_BASE + unsigned(q - shared_data());
        if (q >= static_data() && q < static_data() + static_bytes())
            return STATIC_BASE + unsigned(q - static_data());
        fail("shared_address of something that is not shared");
    }

    Barrier& barrier(unsigned address) {
        auto found = barriers.find(address);
        if (found == barriers.end()) fail("a barrier is used before it is initialised");
        return found->second;
    }

    void start_copy(unsigned to, const void* from, unsigned bytes, unsigned where) {
        auto* source = static_cast<const unsigned char*>(from);
        if (!bytes || to % 16 || uintptr_t(source) % 16 || bytes % 16) fail("misaligned bulk copy");
        bool known = false;
        for (const Range& r : memory)
            known |= source >= r.begin && source + bytes <= r.begin + r.bytes;
        if (!known) fail("a bulk copy reads outside the memory of the launch");
        for (const Copy& c : copies)
            if (to < c.to + c.bytes && c.to < to + bytes) fail("two bulk copies have one target");
        barrier(where);
        memset(inside(to, bytes), POISON, bytes);
        copies.push_back({to, bytes, where, source});
    }

    void finish_copies(unsigned where) {
        for (size_t i = 0; i < copies.size();) {
            if (copies[i].barrier != where) {
                i++;
                continue;
            }
            memcpy(inside(copies[i].to, copies[i].bytes), copies[i].from, copies[i].bytes);
            Barrier& b = barrier(where);
            b.bytes -= copies[i].bytes;
            copies.erase(copies.begin() + long(i));
            complete(b);
        }
    }

    void complete(Barrier& b) {
        if (b.pending == 0 && b.bytes == 0) {
            b.pending = b.arrivals;
            b.phase++;
        }
    }

    unsigned random() {
        random_ = random_ * 1664525u + 1013904223u;
        return random_ >> 8;
    }

  private:
    bool run_cta();
    static unsigned char* static_data();
    static size_t static_bytes();

    template <class T>
    void shuffle(std::vector<T>& v) {
        for (size_t i = v.size(); i > 1; i--) std::swap(v[i - 1], v[random() % i]);
    }

    void to_main(Fiber& me) { kvarn_emulator_switch(&me.stack_pointer, main_); }

    static void entry();
    void prepare(Fiber& f);

    std::vector<Fiber> fibers_;
    Meeting warps_[32], cta_;
    unsigned shared_bytes_ = 0, random_ = 1;
    void* main_ = nullptr;
    bool failed_ = false;
    void (*body_)(void*) = nullptr;
    void* body_data_ = nullptr;
};

inline Machine machine;

extern "C" unsigned char __start_kvarn_shared[] __attribute__((weak));
extern "C" unsigned char __stop_kvarn_shared[] __attribute__((weak));
inline unsigned char* Machine::static_data() { return __start_kvarn_shared; }
inline size_t Machine::static_bytes() { return size_t(__stop_kvarn_shared - __start_kvarn_shared); }

inline void Machine::entry() {
    machine.body_(machine.body_data_);
    Fiber& me = machine.fibers_[machine.thread.x];
    me.done = true;
    machine.to_main(me);
    __builtin_unreachable();
}

inline void Machine::prepare(Fiber& f) {
    if (!f.stack) {
        void* p = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) abort();
        f.stack = static_cast<unsigned char*>(p);
    }
    auto* top = reinterpret_cast<void**>(f.stack + STACK_BYTES - 64);
#if defined(__x86_64__)
    top++;           // entry() finds the stack as after a call: 8 bytes off a multiple of 16
    top[0] = nullptr;
    top[-1] = reinterpret_cast<void*>(&Machine::entry);
    f.stack_pointer = top - 1 - SAVED;
#else
    top -= 20;
    memset(top, 0, 160);
    top[11] = reinterpret_cast<void*>(&Machine::entry);
    f.stack_pointer = top;
#endif
    f.done = false;
    f.waits_for = nullptr;
}

inline bool Machine::run_cta() {
    const unsigned count = block_size.x;
    if (fibers_.size() < count) fibers_.resize(count);
    shared.resize(shared_bytes_ + 2048);
    memset(shared.data(), POISON, shared.size());
    if (static_bytes()) memset(static_data(), POISON, static_bytes());
    copies.clear();
    barriers.clear();
    for (Meeting& m : warps_) m.arrived = 0;
    cta_.arrived = 0;
    failed_ = false;
    std::vector<unsigned> order(count);
    for (unsigned i = 0; i < count; i++) {
        order[i] = i;
        prepare(fibers_[i]);
    }
    shuffle(order);
    for (unsigned left = count, idle = 0; left;) {
        bool moved = false;
        for (unsigned i : order) {
            Fiber& f = fibers_[i];
            if (f.done || (f.waits_for && *f.waits_for == f.seen)) continue;
            moved |= f.waits_for != nullptr || f.stack_pointer != nullptr;
            const bool polls = f.waits_for == nullptr;
            f.waits_for = nullptr;
            thread = {i, 0, 0};
            kvarn_emulator_switch(&main_, f.stack_pointer);
            if (failed_) return false;
            left -= f.done;
            idle = polls ? idle + 1 : 0;
        }
        if (!moved || idle > 1000000) {
            message = "threads wait for each other for ever";
            for (unsigned i = 0; i < count; i++)
                if (!fibers_[i].done) {
                    const Meeting& m = warps_[i / WARP].arrived ? warps_[i / WARP] : cta_;
                    message += m.arrived ? std::string(" at ") + m.name : std::string(" at a barrier");
                    message += " (block " + std::to_string(block.x) + ", thread " + std::to_string(i) + ")";
                    break;
                }
            return false;
        }
    }
    if (!copies.empty()) {
        message = "a CTA ends while a bulk copy is in flight (block " + std::to_string(block.x) + ")";
        return false;
    }
    return true;
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<A>*>(arguments[I])...);
}

// What the exported entry point of an emulated kernel does; 0 if all is well.
template <class... A>
int launch(void (*kernel)(A...), void** arguments, const unsigned* grid, unsigned threads,
           unsigned shared_bytes, unsigned seed, const Range* memory, int ranges, char* message,
           int message_bytes) {
    machine.memory.assign(memory, memory + ranges);
    auto body = [&] { call(kernel, arguments, std::index_sequence_for<A...>{}); };
    const bool fine = machine.run({grid[0], grid[1], grid[2]}, threads, shared_bytes, seed, body);
    snprintf(message, size_t(message_bytes), "%s", machine.message.c_str());
    return fine ? 0 : 1;
}

}  // namespace emulator
