/* A QEMU plugin: how many instructions each layer of an emitted model executes.
 *
 * Arguments: watch=FILE, which says where the program's code lies, and out=FILE, which is written
 * when the program ends. FILE of watch holds lines of hexadecimal addresses:
 *
 *     main FIRST END      the code that calls the model
 *     run FIRST END       the model's entry function
 *     layer FIRST         the first instruction of a layer function, one line for each
 *
 * An inference begins with the first instruction of `run` that follows one of `main`, and ends with
 * the next of `main`. In between, an instruction of `run` is its own; one of a layer's first
 * instructions that follows `run` begins that layer, to which everything belongs until `run` goes
 * on: what the layer calls is the layer's. The result holds a line for each part, in order:
 *
 *     INFERENCE PART INSTRUCTIONS
 *
 * where PART is the number of the layer line, or -1 for `run` itself, whose line ends an inference.
 * On Hexagon QEMU counts packets.
 *
 * A callback for each instruction is the one way to count that all plugin interfaces of QEMU have
 * in common; the inline counters are faster and differ. qemu-plugin.h is not packaged, so the few
 * functions needed are declared here.
 */
#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define NO_REGISTERS 0 /* QEMU_PLUGIN_CB_NO_REGS: a callback looks at no register. */
#define MAX_LAYERS 65536

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;

extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
extern struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *block,
                                                        size_t index);
extern uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *instruction);
extern void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id,
                                                  void (*call)(plugin_id,
                                                               struct qemu_plugin_tb *));
extern void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *instruction,
                                                   void (*call)(unsigned, void *), int flags,
                                                   void *data);
extern void qemu_plugin_register_atexit_cb(plugin_id id, void (*call)(plugin_id, void *),
                                           void *data);

EXPORT int qemu_plugin_version = PLUGIN_VERSION;
EXPORT int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv);

struct range {
    uint64_t first;
    uint64_t end;
};

static struct range caller;
static struct range entry;
static uint64_t layers[MAX_LAYERS];
static int layer_count;
static FILE *result;

static uint64_t executed; /* Of the part that is running. */
static uint64_t own;      /* Of `run` in this inference. */
static int inferences;
static int part;

enum { OUTSIDE = -3, IN_MAIN = -2, IN_RUN = -1 }; /* Or the number of a layer. */

/* Ends the part that was running and begins another. */
static void enter(int next)
{
    if (part == next) {
        return;
    }
    if (part >= 0) {
        fprintf(result, "%d %d %" PRIu64 "\n", inferences, part, executed);
    } else if (part == IN_RUN) {
        own += executed;
    }
    if (next == IN_MAIN && part != OUTSIDE) {
        fprintf(result, "%d %d %" PRIu64 "\n", inferences, IN_RUN, own);
        own = 0;
        inferences++;
    }
    part = next;
    executed = 0;
}

static void any_instruction(unsigned cpu, void *data)
{
    (void)cpu;
    (void)data;
    executed++;
}

static void main_instruction(unsigned cpu, void *data)
{
    (void)cpu;
    (void)data;
    enter(IN_MAIN);
}

static void run_instruction(unsigned cpu, void *data)
{
    (void)cpu;
    (void)data;
    if (part != OUTSIDE) {
        enter(IN_RUN);
    }
    executed++;
}

static void layer_instruction(unsigned cpu, void *data)
{
    (void)cpu;
    if (part == IN_RUN) {
        enter((int)((uint64_t *)data - layers));
    }
    executed++;
}

static bool within(uint64_t address, const struct range *code)
{
    return address >= code->first && address < code->end;
}

static int compare(const void *a, const void *b)
{
    const uint64_t x = *(const uint64_t *)a;
    const uint64_t y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static void translated(plugin_id id, struct qemu_plugin_tb *block)
{
    (void)id;
    const size_t count = qemu_plugin_tb_n_insns(block);
    for (size_t i = 0; i < count; i++) {
        struct qemu_plugin_insn *instruction = qemu_plugin_tb_get_insn(block, i);
        const uint64_t address = qemu_plugin_insn_vaddr(instruction);
        void (*call)(unsigned, void *) = any_instruction;
        void *data = bsearch(&address, layers, (size_t)layer_count, sizeof layers[0], compare);
        if (within(address, &caller)) {
            call = main_instruction;
        } else if (within(address, &entry)) {
            call = run_instruction;
        } else if (data != NULL) {
            call = layer_instruction;
        }
        qemu_plugin_register_vcpu_insn_exec_cb(instruction, call, NO_REGISTERS, data);
    }
}

static void ended(plugin_id id, void *data)
{
    (void)id;
    (void)data;
    fclose(result);
}

/* Reads the watch file; layers are listed by address. */
static bool read_watch(const char *path)
{
    FILE *file = fopen(path, "r");
    if (file == NULL) {
        return false;
    }
    bool good = true;
    char line[128];
    while (good && fgets(line, sizeof line, file) != NULL) {
        struct range *const range = line[0] == 'm' ? &caller : &entry;
        if (line[0] == 'l') {
            good = layer_count < MAX_LAYERS
                   && sscanf(line, "layer %" SCNx64, &layers[layer_count]) == 1;
            layer_count++;
        } else {
            good = sscanf(line, "%*s %" SCNx64 " %" SCNx64, &range->first, &range->end) == 2;
        }
    }
    fclose(file);
    return good;
}

EXPORT int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv)
{
    (void)info;
    for (int i = 0; i < argc; i++) {
        if (strncmp(argv[i], "watch=", 6) == 0 && !read_watch(argv[i] + 6)) {
            return -1;
        }
        if (strncmp(argv[i], "out=", 4) == 0) {
            result = fopen(argv[i] + 4, "w");
        }
    }
    if (result == NULL) {
        return -1;
    }
    part = OUTSIDE;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, ended, NULL);
    return 0;
}
