fn main() -> std::process::ExitCode {
    ingot::engine::main()
}
