// Whether two C functions are called alike: structurally, as names and tags of types are ours or the vendor's.
#pragma once

#include <cstddef>
#include <type_traits>

namespace abi {

template <class T, class = void>
struct Complete : std::false_type {};
template <class T>
struct Complete<T, std::void_t<decltype(sizeof(T))>> : std::true_type {};

// Enums of C are passed as int, whatever the compiler takes them for.
template <class A, class B>
constexpr bool alike() {
  if constexpr (std::is_pointer_v<A> && std::is_pointer_v<B>) {
    using To = std::remove_pointer_t<A>;
    using From = std::remove_pointer_t<B>;
    using Bare = std::remove_cv_t<To>;
    using Other = std::remove_cv_t<From>;
    if constexpr (std::is_const_v<To> != std::is_const_v<From>) {
      return false;
    } else if constexpr (std::is_class_v<Bare> && std::is_class_v<Other>) {
      return true;  // opaque, or compared field by field where it is not
    } else {
      return alike<Bare, Other>();
    }
  } else if constexpr (std::is_void_v<A> || std::is_void_v<B>) {
    return std::is_void_v<A> && std::is_void_v<B>;
  } else if constexpr (std::is_class_v<A> && std::is_class_v<B>) {
    return sizeof(A) == sizeof(B) && alignof(A) == alignof(B);
  } else if constexpr (std::is_enum_v<A> || std::is_enum_v<B>) {
    return (std::is_integral_v<A> || std::is_enum_v<A>) && (std::is_integral_v<B> || std::is_enum_v<B>) &&
           sizeof(A) == sizeof(B);
  } else if constexpr (std::is_integral_v<A> && std::is_integral_v<B>) {
    return sizeof(A) == sizeof(B) && std::is_signed_v<A> == std::is_signed_v<B>;
  } else {
    return std::is_same_v<A, B>;
  }
}

template <class Ours, class Theirs>
struct Called : std::false_type {};
template <class R, class... A, class S, class... B>
struct Called<R(A...), S(B...)> {
  static constexpr bool arguments() {
    if constexpr (sizeof...(A) == sizeof...(B)) {
      return (alike<A, B>() && ...);
    } else {
      return false;
    }
  }
  static constexpr bool value = alike<R, S>() && arguments();
};

}  // namespace abi

// Ours is in the namespace, the vendor's beside it; a constant of either name.
#define ABI_CALLED(SYMBOL, RESULT, ...) \
  static_assert(abi::Called<RESULT __VA_ARGS__, decltype(::SYMBOL)>::value, #SYMBOL " is called otherwise");
#define ABI_EQUAL(NAME) static_assert(static_cast<long>(NAME) == static_cast<long>(::NAME), #NAME " differs");
#define ABI_AT(STRUCT, FIELD)                                                                    \
  static_assert(offsetof(STRUCT, FIELD) == offsetof(::STRUCT, FIELD), #FIELD " lies elsewhere"); \
  static_assert(abi::alike<decltype(STRUCT::FIELD), decltype(::STRUCT::FIELD)>(), #FIELD         \
                " is another "                                                                   \
                "type");
