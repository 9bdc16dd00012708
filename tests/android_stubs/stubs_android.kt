// Declarations only, so that the Android sample of a bundle can be compiled without an Android SDK.
package android.content

class Context {
    val assets: android.content.res.AssetManager get() = TODO()
    val filesDir: java.io.File get() = TODO()
}
