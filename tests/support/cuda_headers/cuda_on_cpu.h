// How does a CUDA kernel run on a CPU, one thread at a time, in an order that brings its mistakes to light?
//
// A block's threads are coroutines, each with a stack of its own. A thread runs until it waits for others, at a
// barrier or at an exchange within its warp, or ends; then the next one runs. Blocks, warps and lanes take their
// turns in an order shuffled by the seed; the seeds 2n and 2n + 1 run everything in exactly opposite orders, so
// whatever depends on which of two threads is first comes out differently. tests/cuda_on_cpu.py puts this file
// before a kernel's source and SIMULATE(kernel) behind it.
#pragma once

#include <link.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

// ------------------------------------------------------------------------------- the language

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// Nothing but __shared__ is thread_local here: `poison_shared` finds all of it in one place.
#define __shared__ static thread_local

struct uint3 {
    unsigned x, y, z;
};
typedef uint3 dim3;

const int warpSize = 32;
#define threadIdx (simulator::machine.current->index)
#define blockIdx (simulator::block_index)
#define blockDim (simulator::block_size)
#define gridDim (simulator::grid_size)

// ---------------------------------------------------------------------------- the simulator

namespace simulator {

inline unsigned bits_of(float x) {
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(unsigned bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

const unsigned MOST_THREADS = 1024, MOST_SHARED = 48 * 1024, STACK = 68 * 1024, PAGE = 4096;
const unsigned short POISON = 0x7ff5;  // a NaN in every type of float, however often repeated

enum State { RUNS, AT_BARRIER, AT_EXCHANGE, ENDED };
const char* const DOING[] = {"runs", "waits at __syncthreads in line %d", "waits for its warp in line %d",
                             "has ended"};

struct Coroutine {
    char* stack;
    size_t stack_size;
    bool started;
    jmp_buf place;  // where it goes on
};

struct Thread {
    uint3 index;
    State state;
    int line;  // where it waits
    Coroutine* coroutine;  // from its first turn to its end
    unsigned exchanges;
    unsigned long long offered[2];  // what it shows its warp: one is read while the next is already written
};

// What all kernels of a process share, although each is a library of its own: the loader merges inline variables
// that are visible. Mapping a stack and starting a coroutine on it takes longer than most threads run, so both
// are kept.
struct Machine {
    Coroutine coroutines[MOST_THREADS];
    Coroutine* idle[MOST_THREADS];
    unsigned idle_count;
    Thread threads[MOST_THREADS];
    Thread* current;
    Thread** next;  // those of a warp that are still to run until they wait, then null
    jmp_buf scheduler;
    void (*kernel)(void**);
    void** arguments;
};
__attribute__((visibility("default"))) inline Machine machine;
static Thread* const threads = machine.threads;

static uint3 grid_size, block_size, block_index;
static jmp_buf failure;
static unsigned long long seed, block_number;
static unsigned turns[MOST_THREADS / 32];
static char* message;
static size_t message_size;

static inline void append(const char* format, ...) {
    size_t used = strlen(message);
    va_list values;
    va_start(values, format);
    vsnprintf(message + used, message_size - used, format, values);
    va_end(values);
}

static inline void append_thread(const Thread& thread) {
    append("thread (%u, %u, %u) ", thread.index.x, thread.index.y, thread.index.z);
    append(DOING[thread.state], thread.line);
}

[[noreturn]] static inline void fail(const char* what, const Thread& one, const Thread& other) {
    append("block (%u, %u, %u): %s: ", block_index.x, block_index.y, block_index.z, what);
    append_thread(one);
    append(", ");
    append_thread(other);
    _longjmp(failure, 1);
}

// The numbers 0 .. n - 1 in an order that follows from the seed and from what it is for, not from when it is
// asked for: only so are the orders of two seeds exactly opposite all the way.
static inline void shuffle(unsigned* order, unsigned n, unsigned long long what, unsigned long long when) {
    const unsigned long long FACTOR = 6364136223846793005, STEP = 1442695040888963407;  // Knuth's MMIX
    unsigned long long state = seed / 2;
    state = (state ^ block_number) * FACTOR + STEP;
    state = (state ^ what) * FACTOR + STEP;
    state = (state ^ when) * FACTOR + STEP;
    for (unsigned i = 0; i < n; i++) order[i] = i;
    for (unsigned i = n; i > 1; i--) {
        state = state * FACTOR + STEP;
        unsigned j = (state >> 32) * i >> 32, last = order[i - 1];
        order[i - 1] = order[j], order[j] = last;
    }
    for (unsigned i = 0; seed % 2 && i < n / 2; i++) {
        unsigned first = order[i];
        order[i] = order[n - 1 - i], order[n - 1 - i] = first;
    }
}

// ------- coroutines: ucontext begins a stack, but asks the system at every switch; _setjmp and _longjmp do not

static void live();

// Runs the next thread of the warp's turn, directly from the one before, or returns to `run_threads`.
[[noreturn]] static __attribute__((noinline)) void run_next() {
    Thread* thread = machine.current = *machine.next++;
    if (!thread) _longjmp(machine.scheduler, 1);
    if (!thread->coroutine) thread->coroutine = machine.idle[--machine.idle_count];
    Coroutine* coroutine = thread->coroutine;
    if (coroutine->started) _longjmp(coroutine->place, 1);
    coroutine->started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = coroutine->stack;
    context.uc_stack.ss_size = coroutine->stack_size;
    makecontext(&context, live, 0);
    setcontext(&context);
    abort();
}

static __attribute__((noinline)) void pause_thread(State state, int line) {
    Thread* thread = machine.current;
    thread->state = state, thread->line = line;
    if (!_setjmp(thread->coroutine->place)) run_next();
}

static void live() {
    for (;;) {  // one turn for each thread
        machine.kernel(machine.arguments);
        machine.idle[machine.idle_count++] = machine.current->coroutine;  // of the next thread that begins
        pause_thread(ENDED, 0);
    }
}

static __attribute__((noinline)) void run_threads(Thread** threads) {
    machine.next = threads;
    if (!_setjmp(machine.scheduler)) run_next();
}

// ------- running a block

static void run_warp(unsigned warp) {
    unsigned order[32];
    Thread *lanes = threads + 32 * warp, *running[33];
    for (;;) {
        shuffle(order, 32, warp, turns[warp]++);
        Thread** end = running;
        for (unsigned i : order)
            if (lanes[i].state == RUNS) *end++ = &lanes[i];
        *end = nullptr;
        run_threads(running);
        Thread* waiting = nullptr;
        for (unsigned i = 0; i < 32; i++)
            if (lanes[i].state == AT_EXCHANGE) waiting = &lanes[i];
        if (!waiting) return;
        for (unsigned i = 0; i < 32; i++)
            if (lanes[i].state != AT_EXCHANGE || lanes[i].line != waiting->line)
                fail("exchange not reached by all 32 threads of a warp", *waiting, lanes[i]);
        for (unsigned i = 0; i < 32; i++) lanes[i].state = RUNS;
    }
}

static void run_block(unsigned count) {
    unsigned order[MOST_THREADS / 32];
    memset(turns, 0, sizeof turns);
    for (unsigned i = 0; i < count; i++) threads[i].state = RUNS, threads[i].coroutine = nullptr;
    for (unsigned barriers = 0;; barriers++) {
        shuffle(order, count / 32, MOST_THREADS, barriers);
        for (unsigned i = 0; i < count / 32; i++) run_warp(order[i]);
        for (unsigned i = 0; i < count; i++)
            if (threads[i].state != threads[0].state || threads[i].line != threads[0].line)
                fail("barrier not reached by all threads", threads[0], threads[i]);
        if (threads[0].state == ENDED) return;
        for (unsigned i = 0; i < count; i++) threads[i].state = RUNS;
    }
}

// ------- shared memory

struct Shared {
    unsigned short* begin;
    size_t size;
};
alignas(16) static thread_local char first_shared[16];  // that there is such memory, and that it is mapped

static int find_shared(dl_phdr_info* library, size_t, void* found) {
    bool this_one = false;
    size_t size = 0;
    for (int i = 0; i < library->dlpi_phnum; i++) {
        const ElfW(Phdr)& part = library->dlpi_phdr[i];
        size_t offset = size_t(&find_shared) - library->dlpi_addr - part.p_vaddr;
        if (part.p_type == PT_LOAD && offset < part.p_memsz) this_one = true;
        if (part.p_type == PT_TLS) size = part.p_memsz;
    }
    if (this_one) *(Shared*)found = {(unsigned short*)library->dlpi_tls_data, size};
    return this_one;
}

// Each thread of the process has its own such memory, but the place of `first_shared` within it is the same.
static Shared find_shared() {
    static size_t before, size;
    memset(first_shared, 0, sizeof first_shared);
    if (!size) {
        Shared shared = {nullptr, 0};
        dl_iterate_phdr(find_shared, &shared);
        before = first_shared - (char*)shared.begin, size = shared.size;
    }
    return {(unsigned short*)(first_shared - before), size};
}

static void poison_shared(const Shared& shared) {
    for (size_t i = 0; i < shared.size / 2; i++) shared.begin[i] = POISON;
}

// ------- running a grid

static uint3 place_in(uint3 size, unsigned i) { return {i % size.x, i / size.x % size.y, i / size.x / size.y}; }

static void make_stacks() {
    const int ACCESS = PROT_READ | PROT_WRITE, KIND = MAP_PRIVATE | MAP_ANONYMOUS;
    char* stacks = (char*)mmap(nullptr, MOST_THREADS * STACK, ACCESS, KIND, -1, 0);
    for (unsigned i = 0; i < MOST_THREADS; i++) {
        mprotect(stacks + i * STACK, PAGE, PROT_NONE);  // a stack that is too small must not reach its neighbour
        machine.coroutines[i].stack = stacks + i * STACK + PAGE;
        machine.coroutines[i].stack_size = STACK - PAGE - i % 64 * 64;  // their ends use different cache lines
    }
}

// Make all coroutines idle: there are none yet, or some are still within a kernel that failed.
static void make_coroutines() {
    if (!machine.coroutines[0].stack) make_stacks();
    machine.idle_count = MOST_THREADS;
    for (unsigned i = 0; i < MOST_THREADS; i++) {
        machine.coroutines[i].started = false;
        machine.idle[i] = &machine.coroutines[i];
    }
}

static void make_threads(unsigned count) {
    for (unsigned i = 0; i < count; i++) {
        threads[i].index = place_in(block_size, i);
        threads[i].exchanges = 0;
    }
}

static void run_blocks(unsigned count, const unsigned* order, unsigned blocks) {
    Shared shared = find_shared();
    if (shared.size > MOST_SHARED + sizeof first_shared) {
        append("%zu bytes of __shared__ memory: a block has %u", shared.size - sizeof first_shared, MOST_SHARED);
        _longjmp(failure, 1);
    }
    for (unsigned i = 0; i < blocks; i++) {
        block_number = order[i];
        block_index = place_in(grid_size, order[i]);
        poison_shared(shared);
        run_block(count);
    }
}

// Runs the kernel; false, with `message` filled in, if it went wrong.
static bool run(uint3 grid, uint3 block) {
    grid_size = grid, block_size = block;
    unsigned count = block.x * block.y * block.z, blocks = grid.x * grid.y * grid.z;
    unsigned* const order = (unsigned*)malloc(blocks * sizeof(unsigned));
    block_number = 0;
    shuffle(order, blocks, MOST_THREADS + 1, 0);
    if (machine.idle_count < MOST_THREADS) make_coroutines();
    make_threads(count);
    bool failed = _setjmp(failure);
    if (!failed) run_blocks(count, order, blocks);
    free(order);
    return !failed;
}

// ------- a kernel's parameters: their types by name, and its call with the arguments that `args` points to

template <class T> struct Name;
#define NAME(type) template <> struct Name<type> { static constexpr const char* text = #type; };
NAME(bool) NAME(signed char) NAME(unsigned char) NAME(short) NAME(unsigned short) NAME(int) NAME(unsigned int)
NAME(long long) NAME(unsigned long long) NAME(float) NAME(double)
#undef NAME

template <class T> struct Parameter {
    static void append_name() { append("%s;", Name<T>::text); }
};
template <class T> struct Parameter<T*> {
    static void append_name() { append("%s*;", Name<T>::text); }
};
template <class T> struct Parameter<const T*> {
    static void append_name() { append("const %s*;", Name<T>::text); }
};

template <class... P> void append_names(void (*)(P...)) { (Parameter<P>::append_name(), ...); }

template <int... I> struct Numbers {};
template <int N, int... I> struct Count : Count<N - 1, N - 1, I...> {};
template <int... I> struct Count<0, I...> { using To = Numbers<I...>; };

template <class... P, int... I> void call(void (*function)(P...), void** args, Numbers<I...>) {
    function(*(P*)args[I]...);
}
template <class... P> void call(void (*function)(P...), void** args) {
    call(function, args, typename Count<sizeof...(P)>::To());
}

// ------- what lanes show each other

struct Line {  // no number turns into one: an argument too many does not compile
    int number;
    explicit Line(int line) : number(line) {}
};

template <class T> T exchange(unsigned mask, T value, unsigned from, Line line) {
    static_assert(Name<T>::text && sizeof(T) >= 4, "CUDA exchanges numbers of 4 and of 8 bytes");
    Thread* current = machine.current;
    if (mask != 0xffffffff) fail("exchange of less than a warp is not simulated", *current, *current);
    unsigned place = current->exchanges++ % 2;
    memcpy(&current->offered[place], &value, sizeof value);
    pause_thread(AT_EXCHANGE, line.number);
    Thread* lanes = threads + (current - threads) / 32 * 32;
    memcpy(&value, &lanes[from % 32].offered[place], sizeof value);
    return value;
}

inline unsigned lane() { return (machine.current - threads) % 32; }

}  // namespace simulator

#define SIMULATE(...)                                                                                             \
    extern "C" __attribute__((visibility("default"))) void parameters(char* message, size_t size) {               \
        simulator::message = message, simulator::message_size = size;                                             \
        simulator::append_names(__VA_ARGS__);                                                                     \
    }                                                                                                             \
    extern "C" __attribute__((visibility("default"))) bool launch(                                                \
        const unsigned* sizes, void** arguments, unsigned long long seed, char* message, size_t message_size) {   \
        simulator::machine.kernel = [](void** arguments) { simulator::call(__VA_ARGS__, arguments); };                    \
        simulator::machine.arguments = arguments, simulator::seed = seed;                                                 \
        simulator::message = message, simulator::message_size = message_size;                                     \
        return simulator::run({sizes[0], sizes[1], sizes[2]}, {sizes[3], sizes[4], sizes[5]});                    \
    }

// --------------------------------------------------------------------- CUDA's functions

#define LINE simulator::Line line = simulator::Line(__builtin_LINE())

inline void __syncthreads(LINE) { simulator::pause_thread(simulator::AT_BARRIER, line.number); }
inline void __syncwarp(LINE) { simulator::exchange(0xffffffff, 0, 0, line); }
template <class T> T __shfl_sync(unsigned mask, T x, int from, LINE) {
    return simulator::exchange(mask, x, from, line);
}
template <class T> T __shfl_xor_sync(unsigned mask, T x, int bits, LINE) {
    return simulator::exchange(mask, x, simulator::lane() ^ bits, line);
}
template <class T> T __shfl_down_sync(unsigned mask, T x, unsigned step, LINE) {
    unsigned lane = simulator::lane();
    return simulator::exchange(mask, x, lane + step < 32 ? lane + step : lane, line);
}
#undef LINE

#define ATOMIC_ADD(type)                      \
    inline type atomicAdd(type* place, type x) { \
        type before = *place;                 \
        *place = before + x;                  \
        return before;                        \
    }
ATOMIC_ADD(int) ATOMIC_ADD(unsigned) ATOMIC_ADD(unsigned long long) ATOMIC_ADD(float) ATOMIC_ADD(double)
#undef ATOMIC_ADD

inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}

#define INFINITY (__builtin_inff())

// A float stays a float, as in CUDA. The names of the C library are not included: what is not here has no twin.
#define UNARY(name)                                               \
    inline float name(float x) { return __builtin_##name##f(x); } \
    inline double name(double x) { return __builtin_##name(x); }  \
    template <class T> T name(T) = delete;
UNARY(exp) UNARY(log) UNARY(log1p) UNARY(expm1) UNARY(tanh) UNARY(erf) UNARY(sqrt) UNARY(fabs) UNARY(floor)
#undef UNARY

#define BINARY(name, function)                                                      \
    inline float name(float a, float b) { return __builtin_##function##f(a, b); }   \
    inline double name(double a, double b) { return __builtin_##function(a, b); }
BINARY(pow, pow) BINARY(fmax, fmax) BINARY(fmin, fmin) BINARY(max, fmax) BINARY(min, fmin)
#undef BINARY
#define INTEGERS(type)                                    \
    inline type max(type a, type b) { return a > b ? a : b; } \
    inline type min(type a, type b) { return a < b ? a : b; }
INTEGERS(int) INTEGERS(unsigned) INTEGERS(long long) INTEGERS(unsigned long long)
#undef INTEGERS
