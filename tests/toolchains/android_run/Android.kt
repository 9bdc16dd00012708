// What the Android sample uses of Android, for a desktop JVM. Signatures are written from the reference of the Android SDK.
package android.content

import java.io.File
import java.io.InputStream

class Context(val assets: Assets, val filesDir: File)

class Assets(private val root: File) {
    fun open(path: String): InputStream = File(root, path).inputStream()
}
