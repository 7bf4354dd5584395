// The program. Everything it can do is a command of experiments/cli.h.
#include "experiments/cli.h"

int main(int argc, char** argv) { return moelab::run_program(argc, argv); }
