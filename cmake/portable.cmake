# Lets a module that was linked on a newer Linux run on any with glibc 2.28 (x86-64), as torch's own
# wheels do. glibc 2.34 moved functions of old between its libraries and 2.29 gave some a new version;
# a link here would ask for those. So it finds first stand-ins of the older libraries, which hold
# nothing but names and versions. libstdc++ goes into the module, where nothing else sees it.

add_library(mmbal_portable INTERFACE)

# mmbal_stand_in(<name> <soname's version> <version>=<function>,... ...)
function(mmbal_stand_in name number)
  set(assembly "  .text\n")
  set(versions)
  foreach(group IN LISTS ARGN)
    string(REGEX MATCH "^([^=]+)=(.*)$" _ ${group})
    string(APPEND versions "${CMAKE_MATCH_1} {\n")
    string(REPLACE "," ";" functions ${CMAKE_MATCH_2})
    foreach(function IN LISTS functions)
      string(APPEND assembly "  .globl ${function}\n  .type ${function}, @function\n${function}:\n  ret\n")
      string(APPEND versions "  ${function};\n")
    endforeach()
    string(APPEND versions "};\n")
  endforeach()
  set(folder ${CMAKE_BINARY_DIR}/portable)
  file(CONFIGURE OUTPUT ${folder}/${name}.cpp CONTENT "asm(R\"(\n${assembly})\");\n")
  file(CONFIGURE OUTPUT ${folder}/${name}.map CONTENT "${versions}")
  set(target mmbal_portable_${name})
  add_library(${target} SHARED EXCLUDE_FROM_ALL ${folder}/${name}.cpp)
  set_target_properties(
    ${target} PROPERTIES OUTPUT_NAME ${name} SOVERSION ${number}
                         LIBRARY_OUTPUT_DIRECTORY ${folder})
  target_link_options(${target} PRIVATE -nostdlib -Wl,--version-script=${folder}/${name}.map)
  target_link_libraries(mmbal_portable INTERFACE ${target})
endfunction()

mmbal_stand_in(m 6 GLIBC_2.2.5=exp,exp2,log,log2,pow)
mmbal_stand_in(dl 2 GLIBC_2.2.5=dladdr,dlclose,dlerror,dlopen,dlsym,dlvsym GLIBC_2.3.4=dlmopen)
mmbal_stand_in(rt 1 GLIBC_2.2.5=shm_open,shm_unlink)
set(threads
    pthread_condattr_setpshared pthread_create pthread_detach pthread_getspecific pthread_join
    pthread_key_create pthread_key_delete pthread_kill pthread_mutex_trylock
    pthread_mutexattr_destroy pthread_mutexattr_init pthread_mutexattr_setpshared
    pthread_mutexattr_settype pthread_once pthread_rwlock_destroy pthread_rwlock_init
    pthread_rwlock_rdlock pthread_rwlock_timedrdlock pthread_rwlock_timedwrlock
    pthread_rwlock_tryrdlock pthread_rwlock_trywrlock pthread_rwlock_unlock pthread_rwlock_wrlock
    pthread_rwlockattr_destroy pthread_rwlockattr_init pthread_rwlockattr_setpshared
    pthread_setspecific pthread_spin_destroy pthread_spin_init pthread_spin_lock
    pthread_spin_trylock pthread_spin_unlock sem_destroy sem_init sem_post sem_timedwait sem_trywait
    sem_wait)
list(JOIN threads "," threads)
mmbal_stand_in(pthread 0 GLIBC_2.2.5=${threads})

# A variable of glibc 2.32 that libstdc++ looks at; 0: there may be other threads.
file(CONFIGURE OUTPUT ${CMAKE_BINARY_DIR}/portable/single_threaded.cpp
     CONTENT "extern \"C\" {\nchar __libc_single_threaded = 0;\n}\n")
target_sources(mmbal_portable INTERFACE ${CMAKE_BINARY_DIR}/portable/single_threaded.cpp)
# What is never called goes: libstdc++'s std::random_device alone would ask for glibc 2.36. The
# stand-ins must count although the CUDA runtime, which needs them, comes after them.
target_link_options(mmbal_portable INTERFACE -static-libstdc++ -Wl,--gc-sections
                    -Wl,--no-as-needed -s)
