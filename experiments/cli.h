// The program's commands. Each lives in cmd_<name>.cpp and adds itself to the command line; its callback throws
// moelab::Error, which run_program() turns into one line on stderr and a documented exit code.
#pragma once

#include <string>
#include <vector>

namespace CLI {
class App;
}

namespace moelab {

int run_program(int argc, char** argv);

void add_run_command(CLI::App& app);         // run, resume, eval
void add_check_command(CLI::App& app);
void add_list_command(CLI::App& app);        // list, describe
void add_route_command(CLI::App& app);
void add_verify_command(CLI::App& app);
void add_data_command(CLI::App& app);
void add_new_command(CLI::App& app);
void add_docs_command(CLI::App& app);
void add_ckpt_command(CLI::App& app);
void add_completion_command(CLI::App& app);

// The verbs below `app`, for suggestions and completion.
std::vector<std::string> verb_names(const CLI::App& app);

}  // namespace moelab
