// A multiprocessor on the CPU: every CUDA thread is a fiber, lanes of a warp meet where the real
// instructions make them meet, and up to four CTAs are there at once. Meant to find errors: shared memory starts as NaN, a bulk copy
// spoils its target until somebody has waited for it, lanes run in an order that the seed decides,
// and whatever a GPU would leave undefined ends the launch with a message.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "switch.hpp"

namespace emulator {

constexpr int WARP = 32;
constexpr size_t STACK_BYTES = 256 * 1024;
constexpr unsigned SHARED_BASE = 1024;       // address 0 is never valid
constexpr unsigned STATIC_BASE = 1u << 20;   // variables declared __shared__
constexpr unsigned MOST_COPIES = 1u << 14;   // of a launch; tests are small
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

struct Cta {
    Index block;
    std::vector<unsigned char> shared;
    std::vector<Copy> copies;  // in flight
    std::map<unsigned, Barrier> barriers;
    std::vector<Fiber> fibers;
    std::vector<unsigned> order;
    Meeting warps[32], all;
    unsigned left = 0, idle = 0;  // threads that are not done; switches since one did more than look
};

struct Range {
    const unsigned char* begin;
    size_t bytes;
};

class Machine {
  public:
    Index thread, block, block_size, grid_size;  // of the running fiber
    std::vector<Range> memory;                   // what bulk copies may read
    std::string message;

    unsigned char* shared_data() {
        return reinterpret_cast<unsigned char*>((uintptr_t(here_->shared.data()) + 1023) & ~uintptr_t(1023));
    }

    template <class Body>
    bool run(Index grid, unsigned threads, unsigned shared_bytes, unsigned seed, Body body) {
        message.clear();
        random_ = seed * 2654435761u + 12345;
        grid_size = grid;
        block_size = {threads, 1, 1};
        copies_ = 0;
        shared_bytes_ = shared_bytes;
        if (threads % WARP || threads > 1024) return message = "threads are not whole warps", false;
        body_ = [](void* b) { (*static_cast<Body*>(b))(); };
        body_data_ = &body;
        std::vector<unsigned> order(grid.x * grid.y * grid.z);
        for (unsigned i = 0; i < order.size(); i++) order[i] = i;
        shuffle(order);  // CTAs end in any order
        const unsigned together = static_bytes() ? 1 : 1 + seed % 4;
        if (ctas_.size() < together) ctas_.resize(together);
        std::vector<Cta*> running;
        for (size_t next = 0; next < order.size() || !running.empty();) {
            while (running.size() < together && next < order.size()) {
                auto free = std::find_if(ctas_.begin(), ctas_.end(), [](Cta& c) { return !c.left; });
                const unsigned i = order[next++];
                free->block = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
                begin(*free);
                running.push_back(&*free);
            }
            const size_t i = running.size() > 1 ? random() % running.size() : 0;
            if (!turn(*running[i])) {
                for (Cta& c : ctas_) c.left = 0;
                return false;
            }
            if (!running[i]->left) running.erase(running.begin() + long(i));
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
        Fiber& me = here_->fibers[thread.x];
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
        return meet<Out>(here_->warps[thread.x / WARP], WARP, thread.x % WARP, name, in, compute);
    }

    template <class Out, class In, class Compute>
    Out cta(const char* name, const In& in, Compute compute) {
        return meet<Out>(here_->all, int(block_size.x), int(thread.x), name, in, compute);
    }

    unsigned threads() const { return block_size.x; }

    unsigned char* at(unsigned address, unsigned bytes, bool reads) {
        if (address % (bytes < 16 ? bytes : 16)) fail("misaligned access to shared memory");
        if (random() % 128 == 0) yield();  // others may come first
        if (reads)
            for (const Copy& c : here_->copies)
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
        auto found = here_->barriers.find(address);
        if (found == here_->barriers.end()) fail("a barrier is used before it is initialised");
        return found->second;
    }

    void start_copy(unsigned to, const void* from, unsigned bytes, unsigned where) {
        auto* source = static_cast<const unsigned char*>(from);
        if (!bytes || to % 16 || uintptr_t(source) % 16 || bytes % 16) fail("misaligned bulk copy");
        bool known = false;
        for (const Range& r : memory)
            known |= source >= r.begin && source + bytes <= r.begin + r.bytes;
        if (!known) fail("a bulk copy reads outside the memory of the launch");
        for (const Copy& c : here_->copies)
            if (to < c.to + c.bytes && c.to < to + bytes) fail("two bulk copies have one target");
        if (++copies_ > MOST_COPIES) fail("bulk copies without end");
        barrier(where);
        memset(inside(to, bytes), POISON, bytes);
        here_->copies.push_back({to, bytes, where, source});
    }

    void start_barrier(unsigned address, unsigned arrivals) {
        at(address, 8, true);
        here_->barriers[address] = {arrivals, arrivals};
    }

    void finish_copies(unsigned where) {
        std::vector<Copy>& copies = here_->copies;
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
    void begin(Cta& cta);
    bool turn(Cta& cta);
    static unsigned char* static_data();
    static size_t static_bytes();

    template <class T>
    void shuffle(std::vector<T>& v) {
        for (size_t i = v.size(); i > 1; i--) std::swap(v[i - 1], v[random() % i]);
    }

    void to_main(Fiber& me) { kvarn_emulator_switch(&me.stack_pointer, main_); }

    static void entry();
    void prepare(Fiber& f);

    std::deque<Cta> ctas_;  // places for as many as are there at once
    Cta* here_ = nullptr;   // of the running fiber
    unsigned copies_ = 0;   // of this launch
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
    Fiber& me = machine.here_->fibers[machine.thread.x];
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

inline void Machine::begin(Cta& cta) {
    here_ = &cta;
    cta.left = block_size.x;
    cta.idle = 0;
    if (cta.fibers.size() < cta.left) cta.fibers.resize(cta.left);
    cta.shared.resize(shared_bytes_ + 2048);
    memset(cta.shared.data(), POISON, cta.shared.size());
    if (static_bytes()) memset(static_data(), POISON, static_bytes());
    cta.copies.clear();
    cta.barriers.clear();
    for (Meeting& m : cta.warps) m.arrived = 0;
    cta.all.arrived = 0;
    failed_ = false;
    cta.order.resize(cta.left);
    for (unsigned i = 0; i < cta.left; i++) {
        cta.order[i] = i;
        prepare(cta.fibers[i]);
    }
    shuffle(cta.order);
}

// Every thread of a CTA that can do something does it once.
inline bool Machine::turn(Cta& cta) {
    here_ = &cta;
    block = cta.block;
    bool moved = false;
    for (unsigned i : cta.order) {
        Fiber& f = cta.fibers[i];
        if (f.done || (f.waits_for && *f.waits_for == f.seen)) continue;
        moved = true;
        const bool polls = f.waits_for == nullptr;
        f.waits_for = nullptr;
        thread = {i, 0, 0};
        kvarn_emulator_switch(&main_, f.stack_pointer);
        if (failed_) return false;
        cta.left -= f.done;
        cta.idle = polls ? cta.idle + 1 : 0;
    }
    const auto block_name = [&] { return " (block " + std::to_string(block.x); };
    if (!moved || cta.idle > 1000000) {
        message = "threads wait for each other for ever";
        for (unsigned i = 0; i < block_size.x; i++)
            if (!cta.fibers[i].done) {
                const Meeting& m = cta.warps[i / WARP].arrived ? cta.warps[i / WARP] : cta.all;
                message += m.arrived ? std::string(" at ") + m.name : std::string(" at a barrier");
                message += block_name() + ", thread " + std::to_string(i) + ")";
                break;
            }
        return false;
    }
    if (!cta.left && !cta.copies.empty()) {
        message = "a CTA ends while a bulk copy is in flight" + block_name() + ")";
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
