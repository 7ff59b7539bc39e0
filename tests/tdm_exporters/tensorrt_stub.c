/* What NVIDIA's Python bindings want to find when they are loaded without TensorRT's libraries. Each entry gives null. */
#define ABSENT(name) void *name(void) { return 0; }
ABSENT(createInferBuilder_INTERNAL)
ABSENT(createInferRefitter_INTERNAL)
ABSENT(createInferRuntime_INTERNAL)
ABSENT(createNvOnnxParserRefitter_INTERNAL)
ABSENT(createNvOnnxParser_INTERNAL)
ABSENT(getBuilderPluginRegistry)
ABSENT(getNvOnnxParserVersion)
ABSENT(getPluginRegistry)
ABSENT(initLibNvInferPlugins)
