/* The end of a part that has functions alone: a module of its ``methods``, which knows the checksum of its sources. */
#define MODULE(name, doc)                                                                                       \
    static int add_sources(PyObject *module) { return PyModule_AddStringConstant(module, "SOURCES", SOURCES); } \
    static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, add_sources}, {0, NULL}};                           \
    static PyModuleDef module = {                                                                               \
        PyModuleDef_HEAD_INIT, #name, doc, 0, methods, module_slots, NULL, NULL, NULL,                          \
    };                                                                                                          \
    PyMODINIT_FUNC PyInit_##name(void) { return PyModuleDef_Init(&module); }
